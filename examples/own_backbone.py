"""Use a network of your own as the frozen backbone: `python:own_backbone:encoder`."""

from torch import nn

from fedhead import RunConfig
from fedhead.backbones import ImagePreprocessing
from fedhead.simulations import simulate


def encoder() -> tuple[nn.Module, ImagePreprocessing]:
    """Return a module and its preprocessing. Load trained weights here; these are random but seeded."""
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    return module, ImagePreprocessing(1, resize=(16, 16), crop=None, mean=(0.5,), std=(0.5,))


def main() -> None:
    """Solve a head on its features in one exchange."""
    result = simulate(RunConfig(backbone="python:own_backbone:encoder", rounds=0), data="digits", sites=10)
    print(f"accuracy {result.accuracy:.1%} with {result.model.backbone.num_features} features")


if __name__ == "__main__":
    main()
