"""One drawn sequence put to a law again, on a checkpoint as it is now."""

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.errors import NotApplicable, PromptError
from streamgauge.numerics.draws import Draw, worst


def replay(checkpoint: Checkpoint, law: str, draw: Draw, device: str = "cpu") -> tuple[float, int]:
    """Its error over what rounding explains, and the first layer that has one above 1, or where it
    is largest.

    Raises PromptError for tokens that the model cannot read, NotApplicable where the law cannot be
    put to this model.
    """
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.forward import walk
    from streamgauge.engine.layout import probe_layout
    from streamgauge.engine.load import context_length, load_model
    from streamgauge.groups.draws import DrawsGroup

    model = Blockwise(load_model(checkpoint, device).mapped)
    context = context_length(model.mapped.model.config)
    if not all(0 <= i < model.vocabulary for i in draw.ids) or len(draw.ids) > context:
        raise PromptError(
            f"{checkpoint.name} reads up to {context} tokens with ids below {model.vocabulary}; "
            "give --tokens that it can read."
        )
    if not 1 <= draw.kept <= len(draw.ids):
        raise PromptError(f"--kept {draw.kept} is not between 1 and {len(draw.ids)} tokens.")
    group = DrawsGroup(model, probe_layout(model), [draw], [law])
    walk(model, {"draws": group})
    arrays, absent = group.found()
    if law not in arrays:
        why = absent.get(law) or group.failed.get(law) or "none of its layers can be put to it"
        raise NotApplicable(f"{law} cannot be put to {checkpoint.name}: {why}.")
    return worst(arrays[law])
