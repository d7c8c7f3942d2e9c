"""What hypothesis draws, how often, and how a draw that breaks a law is made as small as it can
be.
"""

import gc
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from hypothesis import HealthCheck, Phase, errors, find, settings
from hypothesis import strategies as st

from streamgauge.numerics.draws import TWINS, Draw, HeadDraw

T = TypeVar("T")
PROFILES = {"audit": 40, "thorough": 1200}  # draws of each law that needs the weights alone
FORWARD = 4  # for so many of these one goes through the model
LONGEST = {"audit": 128, "thorough": 1024}  # tokens of a drawn sequence, where the context has them
MANY = 64  # draws from which sequences may be as long as in `thorough`


def register_profiles() -> None:
    """Make --hypothesis-profile know ours: the same draws every time, and nothing written."""
    for name, count in PROFILES.items():
        settings.register_profile(
            name, max_examples=count, derandomize=True, deadline=None, database=None
        )


def profile_draws(name: str | None) -> int:
    """How many draws a profile asks for (default: audit)."""
    if name is None or name in PROFILES:
        return PROFILES[name or "audit"]
    count: int = settings.get_profile(name).max_examples
    return count


def smallest(what: st.SearchStrategy[T], breaks: Callable[[T], bool], draws: int) -> T | None:
    """The simplest of what was drawn that breaks something, None where nothing did."""
    own = settings(
        max_examples=draws,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    # Hypothesis has itself called by the garbage collector, and an interrupt that arrives within
    # that call is lost.
    callbacks, was_enabled = list(gc.callbacks), gc.isenabled()
    gc.disable()
    try:
        return find(what, breaks, settings=own, random=Random(0))
    except errors.NoSuchExample:
        return None
    finally:
        gc.callbacks[:] = callbacks
        if was_enabled:
            gc.enable()


def all_draws(what: st.SearchStrategy[T], draws: int) -> list[T]:
    """So many draws, none of them twice."""
    found: dict[T, None] = {}

    def keep(one: T) -> bool:
        found[one] = None
        return False

    smallest(what, keep, draws)
    return list(found)


def heads(n_heads: dict[int, int]) -> st.SearchStrategy[HeadDraw]:
    """Heads of layers that have so many, and inputs for them."""
    places = [(layer, head) for layer in sorted(n_heads) for head in range(n_heads[layer])]
    return st.builds(
        lambda place, samples, seed: HeadDraw(place[0], place[1], samples, seed),
        st.sampled_from(places),
        st.just(0) | st.integers(16, 512),
        st.integers(0, 2**16),
    )


def token_sequences(
    vocabulary: int,
    context: int,
    special: Sequence[int],
    texts: Sequence[Sequence[int]],
    draws: int,
) -> st.SearchStrategy[Draw]:
    """Sequences of token ids of any length that the context, and the number of draws, allow: any
    ids, one that repeats, a stretch of the vocabulary, special tokens, text.
    """
    longest = min(context, LONGEST["thorough" if draws >= MANY else "audit"])
    lengths, token = st.integers(1, longest), st.integers(0, vocabulary - 1)
    if special:
        token |= st.sampled_from(sorted(special))
    kinds = [
        st.lists(token, min_size=1, max_size=longest).map(tuple),
        st.builds(lambda length, one: (one,) * length, lengths, token),
        st.builds(
            lambda length, one: tuple((one + n) % vocabulary for n in range(length)), lengths, token
        ),
        st.builds(
            lambda length, seed: tuple(Random(seed).choices(range(vocabulary), k=length)),
            lengths,
            st.integers(0, 2**16),
        ),
    ]
    if texts:
        kinds.append(
            st.builds(
                lambda length, text: tuple(text[:length]), lengths, st.sampled_from(list(texts))
            )
        )
    return st.builds(
        lambda ids, kept, twin, seed: Draw(ids, 1 + kept % len(ids), twin, seed),
        st.one_of(kinds),
        st.integers(0, longest - 1),
        st.sampled_from(TWINS),
        st.integers(0, 2**16),
    )
