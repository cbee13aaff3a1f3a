"""pytorch_optimizer's GaLore with a state of tensors and plain numbers.

It keeps a projector *object* for each matrix, which `torch.load(weights_only=True)` refuses, so no
checkpoint of it can be read back. Here the saved state has the projection matrix, and the objects
are made anew when it is loaded. Nothing of the arithmetic is touched.
"""

from typing import Any

from pytorch_optimizer import GaLore
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector


class TensorStateGaLore(GaLore):
    def state_dict(self) -> dict[str, Any]:
        """As torch's; a matrix has the tensor `projection` in place of its projector."""
        saved = super().state_dict()
        return {**saved, "state": {key: _plain(state) for key, state in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if "projection" not in state:
                    continue
                projector = GaLoreProjector(
                    rank=group["rank"],
                    update_proj_gap=group["update_proj_gap"],
                    scale=group["scale"],
                    projection_type=group["projection_type"],
                )
                projector.ortho_matrix = state.pop("projection")
                state["projector"] = projector


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    projector = state.get("projector")
    if projector is None:
        return state
    # Its last_svd_step only keeps one step from two decompositions, so it is not for the file.
    rest = {key: value for key, value in state.items() if key != "projector"}
    return {**rest, "projection": projector.ortho_matrix}
