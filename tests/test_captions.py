"""Cleaning of captions before T5: a table of what the original gives (Open-Sora 1.2, `text_preprocessing`, with ftfy 6.3 and beautifulsoup4 4.15)."""

import pytest

pytest.importorskip("ftfy", reason="ftfy is not installed")
pytest.importorskip("bs4", reason="beautifulsoup4 is not installed")

from mila_jax.model.captions import clean_caption  # noqa: E402

TABLE = (
    ("Driving at Night in the RAIN, Boston; turn left.", "driving at night in the rain, boston; turn left."),
    ("see https://example.com/a/b?x=1 and www.example.org/page now", "see ?x=1 and now"),
    ("www:/odd mail me@host.com or sub-domain.example.ru/", "odd mail me or"),
    ("a &lt;b&gt;bold&lt;/b&gt; car &amp;amp; a &quot;bus&quot; &eacute;t&eacute; &amp", 'a bold< b> car ; a "bus" été'),
    ("<p>two <b>cars</b><br>and a bus</p> <person> waits", "two carsand a bus person waits"),
    ("[parked] (cars) {peds} | a/b \\ c * ~ § ©®™ •", "parked cars peds a b c"),
    ("wet–road — night ― fog-lights ゠ － end", "wet road night fog lights end"),
    ("this-is-my-cute-cat and this_is_my_car", "this is my cute cat and this is my car"),
    ("one-two-three", "one-two-three"),
    ("“quoted” ‘single’ «angled» `ticks` ´acute´ ''''many''''", 'quoted" \'single\' "angled" "ticks" "acute" "many'),
    ('"wholly quoted"', "wholly quoted"),
    ("машина на дороге 3х4 ночью", "машина на дороге ночью"),
    ("a 1920x1080 picture, 3.5×2.1 m, 100х200", "a picture, m"),
    ("#1 lane, #12345 tag, #1234 kept, 1234567 gone", "lane, tag, 1234 kept, gone"),
    ("photo.jpg of IMG_1234.png in video.mp4 jpg images png", "of in"),
    ("Free Shipping worldwide free shipping download free click for more page 12", ""),
    ("jc6640 jc6640vc 6640vc231 j2d1a2a3 abc12 A4", "abc12 a4"),
    ("雨の夜 driving 東京 ㈱ カー", "の driving カー"),
    ("from 192.168.0.1 at 1:23 ", "from at 1:23"),
    ("line\\nbreak and\nreal one\ttab", "line break and real one tab"),
    ("wait... what .. yes . no", "wait what yes no"),
    ("@nickname drives, +the %2B car%20park", "drives, the car park"),
    ("a,b.c/d : e ;f", "a, b. c d: e ;f"),
    ("'_,-:;start and end-:+'", "-:;start and end-"),
    (".hidden", ""),
    ("naïve café â€œmojibakeâ€ schÃ¶n", 'naïve café "mojibake" schã¶n'),
    ("  ", ""),
    ("100% electric + hybrid", "100% electric hybrid"),
    ("aesthetic score: 6.5. motion score: 4.0. camera motion: pan right.", "aesthetic score: 6.5. motion score: 4.0. camera motion: pan right."),
    ("&amp;lt;i&amp;gt;deep&amp;lt;/i&amp;gt; &#39;x&#39;", "lt;i gt;deep lt; i gt; 'x"),
    ("speed: 50km/h; ETA 12:30pm, v2x b2b2c", "speed: 50km h; eta 12:30pm"),
    ("co.uk test.com@host it.it", "co. uk test. com"),
    (
        "Turn left, cross the intersection, parked cars, peds crossing (2), arrive at 5.30.",
        "turn left, cross the intersection, parked cars, peds crossing 2 , arrive at 5.30.",
    ),
)


@pytest.mark.parametrize(("text", "expected"), TABLE)
def test_equals_the_original(text, expected):
    assert clean_caption(text) == expected
