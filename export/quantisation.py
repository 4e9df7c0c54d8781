"""What a bundle keeps of a graph in eight bits: its layers, and what eight bits change in each."""

from __future__ import annotations

from fastgen.files.records import Record


class Layer(Record, frozen=True):
    """A layer's line of the table. `error`: what it alone changes in the network's output, relative L2; `products`: its share
    of the network's multiplications; `quantised`: whether it computes in eight bits."""

    name: str
    error: float
    products: float
    quantised: bool


class Quantisation(Record, frozen=True):
    """What a bundle keeps beside a graph in eight bits. `predicted`: relative L2 of the output, of all layers in eight bits
    together, on the rows that the table was measured on; `budget`: the most that was allowed."""

    budget: float
    predicted: float
    layers: tuple[Layer, ...]

    def summary(self, dtype: str) -> str:
        """One line for the user."""
        kept = sorted((layer for layer in self.layers if not layer.quantised), key=lambda layer: -layer.error)
        share = sum(layer.products for layer in self.layers if layer.quantised)
        line = f"{dtype}: {len(self.layers) - len(kept)} of {len(self.layers)} layers, {share:.1%} of the products, "
        line += f"predicted error {self.predicted:.3f} (at most {self.budget:g})"
        names = ", ".join(layer.name for layer in kept[:3])
        return line + (f"; in higher precision: {names}{', ...' if len(kept) > 3 else ''}" if kept else "")

    def worst(self, count: int = 3) -> list[Layer]:
        """The layers in eight bits that change the output most."""
        return sorted((layer for layer in self.layers if layer.quantised), key=lambda layer: -layer.error)[:count]


def quantisation_name(network: str, graph: str = "int8") -> str:
    """The bundle file that holds a network's `Quantisation`. `graph`: the graph's precision, see `bundle.graph_name`."""
    return f"{network}/model.{graph}.json"
