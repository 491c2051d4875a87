"""The encoding job as an Apache Beam pipeline (`pip install 'mila_jax[beam]'`): one element per scene, the index at the end.

    mila prepare … --beam="--runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=8"
    mila prepare … --beam="--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp --sdk_container_image=IMAGE"

Workers open the job from the config, so data.nuscenes, data.dir and autoencoder.path must be readable there (gs:// on Dataflow) and
mila_jax installed. What a worker finishes stays finished: a pipeline that is run again, or falls back on another way of running,
goes on. The direct runner's multi_threading mode is refused: it lost elements without an error.
"""

import shlex

from data_pipeline.encode import finish
from data_pipeline.jobs import open_from_settings
from mila_jax.errors import UserError

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
except ImportError:
    raise UserError("Apache Beam is not installed; pip install 'mila_jax[beam]'") from None


class EncodeScene(beam.DoFn):
    """Scene number → the same number, once its shard is complete."""

    def __init__(self, settings: str):
        self.settings = settings

    def setup(self):
        """Opens the data set and the networks, once in each worker."""
        from mila_jax.runtime import use_chosen_platform

        use_chosen_platform()
        self.encoder, _ = open_from_settings(self.settings)

    def process(self, number: int):
        """Encodes the scene unless that is done."""
        self.encoder.encode(number)
        yield number


class Finish(beam.DoFn):
    """Writes the index when every scene has come by."""

    def __init__(self, settings: str):
        self.settings = settings

    def process(self, count: int):
        """count: scenes that came by; yields it. Raises RuntimeError when shards are missing, so that no run ends well without them."""
        encoder, text = open_from_settings(self.settings)
        missing = finish(encoder, text.encode)
        if missing or count != len(encoder.nusc.scenes):
            raise RuntimeError(f"{count} of {len(encoder.nusc.scenes)} scenes came by, {len(missing)} shards are missing; run the pipeline again")
        yield count


def parse_options(text: str) -> PipelineOptions:
    """Beam's options from one string. `UserError` for options that Beam does not know how to read, and for multi_threading."""
    options = PipelineOptions(shlex.split(text))
    direct = options.view_as(StandardOptions).runner in (
        None,
        "DirectRunner",
        "BundleBasedDirectRunner",
        "SwitchingDirectRunner",
        "FnApiRunner",
        "PrismRunner",
    )
    if direct and options.view_as(DirectOptions).direct_running_mode == "multi_threading":
        raise UserError("--direct_running_mode=multi_threading loses elements; use multi_processing or in_memory")
    return options


def run(settings: str, options: str, scenes: int) -> None:
    """Runs the pipeline over `scenes` scenes and waits for it; `settings`: the config as JSON, `options`: Beam's, as on a command line."""
    with beam.Pipeline(options=parse_options(options)) as pipeline:
        (
            pipeline
            | "scenes" >> beam.Create(list(range(scenes)))
            | "spread" >> beam.Reshuffle()
            | "encode" >> beam.ParDo(EncodeScene(settings))
            | "count" >> beam.combiners.Count.Globally()
            | "index" >> beam.ParDo(Finish(settings))
        )
