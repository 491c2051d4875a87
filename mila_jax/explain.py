"""What a generation will do, before it does it: the windows as a table, and the noise levels of their frames as a picture.

The picture has the layout of the paper's figure 4: frames of a window to the right, steps downwards, dark is noise.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mila_jax.evaluate.video import write_png
from mila_jax.flow.plan import RolloutPlan, Windows
from mila_jax.flow.rollout import KINDS, SamplerOptions, Tables

SHOWN = 6  # windows of a stage that the table lists
TITLES = {"bootstrap": "bootstrap", "coarse": "coarse", "refine": "plain continuation", "anchored": "(re)fine, ends in an anchor"}


def kinds_of(plan: RolloutPlan) -> dict[str, tuple[Windows, int]]:
    """Kinds of windows that a plan has (names of `flow.rollout.KINDS`) → the first window of the kind: its stage's windows and number."""
    found = {stage: (windows, 0) for stage, windows in plan.stages.items() if stage != "refine"}
    if plan.refine is not None:
        for name, chosen in (("refine", ~plan.refine.anchored), ("anchored", plan.refine.anchored)):
            if chosen.any():
                found[name] = (plan.refine, int(np.argmax(chosen)))
    return found


def roles(windows: Windows, number: int) -> list[str]:
    """What each frame of a window is: given, new, anchor (noisy, to be corrected) or kept (an anchor that stays)."""
    names = ["given" if i < windows.conditioning else "new" for i in range(windows.indices.shape[1])]
    for place in windows.places if windows.anchored[number] else ():
        names[place] = "anchor" if windows.anchor is not None else "kept"
    return names


def describe(plan: RolloutPlan, tables: Tables, options: SamplerOptions) -> str:
    """The table: the plan in a line, the first windows of each stage, the levels of each kind of window."""
    steps = options.steps
    lines = [
        f"strategy {plan.strategy}: {plan.frames} frames at {plan.fps:g} Hz in {plan.windows} windows of {plan.window} frames "
        f"({plan.conditioning} given), {plan.anchors} anchors, {steps} steps a window, {plan.windows * steps} network steps",
        f"TPD {options.family}, strength {options.alpha:g}; anchors wrong by a = {options.a:g}, start at level {options.sigma_a:g}; "
        f"shift {options.shift:.3g}; temperature {options.temperature:g}",
        "",
        f"{'window':>14}  {'fps':>4}  frames (| after the given ones, * anchor to correct, = anchor kept)",
    ]
    for stage, windows in plan.stages.items():
        for number in range(windows.count):
            if SHOWN <= number < windows.count - 1:
                if number == SHOWN:
                    lines.append(f"{'…':>14}")
                continue
            mark = {"anchor": "*", "kept": "="}
            frames = [f"{n}{mark.get(role, '')}" for n, role in zip(windows.indices[number], roles(windows, number))]
            text = " ".join(frames[: windows.conditioning]) + " | " + " ".join(frames[windows.conditioning :])
            lines.append(f"{stage:>10} {number + 1:>3}  {windows.fps:>4.3g}  {text}")
    for name, (windows, number) in kinds_of(plan).items():
        levels = np.asarray(tables.levels[KINDS.index(name)])
        lines += ["", f"levels of a window, {TITLES[name]} (0 clean, 1 noise)", "  step " + "".join(f"{n:>7}" for n in windows.indices[number])]
        chosen = sorted({*range(0, steps + 1, max(1, -(-steps // 12))), steps})
        lines += [f"{step:>6} " + "".join(f"{level:>7.3f}" for level in levels[step]) for step in chosen]
    return "\n".join(lines)


def picture(plan: RolloutPlan, tables: Tables) -> np.ndarray:
    """The picture, uint8 [H, W, 3]: one panel for each kind of window."""
    kinds = kinds_of(plan)
    steps = np.shape(tables.levels)[1] - 1
    cell, row, gap, left, head, foot = 34, max(4, min(16, 480 // (steps + 1))), 36, 46, 64, 24
    width = left + len(kinds) * (plan.window * cell + gap)
    height = head + (steps + 1) * row + foot
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    small, large = (ImageFont.load_default(size=n) for n in (11, 14))
    ink = (27, 31, 36)
    for panel, (name, (windows, number)) in enumerate(kinds.items()):
        x = left + panel * (plan.window * cell + gap)
        draw.text((x, 4), f"{TITLES[name]}, {windows.fps:g} Hz", fill=ink, font=large)
        levels = np.asarray(tables.levels[KINDS.index(name)])
        for place, (frame, role) in enumerate(zip(windows.indices[number], roles(windows, number))):
            centre = x + place * cell + cell / 2
            draw.text((centre, 30), str(frame), fill=ink, font=small, anchor="ma")
            draw.text((centre, 45), role, fill=ink, font=small, anchor="ma")
            for step in range(steps + 1):
                y = head + step * row
                draw.rectangle((x + place * cell, y, x + (place + 1) * cell - 2, y + row - 1), fill=_colour(levels[step, place]))
                if row >= 12 and role != "given":
                    value = levels[step, place]
                    draw.text(
                        (centre, y + row / 2),
                        f"{value:.2f}",
                        fill=(255, 255, 255) if value > 0.4 else ink,
                        font=ImageFont.load_default(size=9),
                        anchor="mm",
                    )
    for step in range(0, steps + 1, max(1, (steps + 1) // 12)):
        draw.text((left - 8, head + step * row + row / 2), str(step), fill=ink, font=small, anchor="rm")
    draw.text((4, 45), "step", fill=ink, font=small)
    draw.text((left, height - foot + 6), "frame numbers of the first window of each kind; light: clean, dark: noise", fill=ink, font=small)
    return np.asarray(sheet)


def _colour(level: float) -> tuple[int, int, int]:
    """Light yellow at 0 to dark blue at 1."""
    light, dark = np.array([250, 246, 220]), np.array([22, 38, 92])
    return tuple(int(c) for c in np.round(light + (dark - light) * float(level)))


def draw_picture(path, plan: RolloutPlan, tables: Tables) -> None:
    """Writes the picture as PNG. Raises `UserError` if it cannot be written."""
    write_png(path, picture(plan, tables))
