"""The figure of held-out images with the truth beside the prediction, in the report of a simulated run."""

from html import escape

from markupsafe import Markup

from fedhead.server.report.layout import Figure, Table
from fedhead.server.runs.record import RunRecord

CAPTION = (
    "From the lowest score to the highest: the truth on the left, the prediction on the right. These sites are "
    "simulated: real ones send no images. This page contains images of the data; pass it on only where they may go."
)


def examples(record: RunRecord) -> list[Figure]:
    """Return the figure, if a simulated run has kept examples."""
    if not record.examples or record.journal.simulated is not True:
        return []
    pairs = "".join(
        f'<div class="pair"><img alt="truth" src="data:image/jpeg;base64,{one.truth}">'
        f'<img alt="prediction" src="data:image/jpeg;base64,{one.prediction}">'
        f"<p>{escape(f'{record.task.score_title} {one.score:.3f}, {one.site}')}</p></div>"
        for one in record.examples
    )
    table = Table(
        ["image", "site", record.task.score_title],
        [[one.name, one.site, f"{one.score:.3f}"] for one in record.examples],
        words=(0, 1),
    )
    return [
        Figure(
            "Held-out images", Markup('<div class="pairs">{}</div>').format(Markup(pairs)), table, CAPTION, wide=True
        )
    ]
