"""Being written."""

from collections.abc import Iterator

from act_export.graft.graph import Graph
from act_export.graft.site import AttentionSite


def find(graph: Graph) -> Iterator[AttentionSite]:
    """Nothing yet."""
    yield from ()
