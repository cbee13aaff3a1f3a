"""What the launcher announces in the environment, against what a recipe can be launched with."""

from pathlib import Path

import pytest
from memory_support import grpo_tree
from support import lm_tree

from mnemic.train.build import build_model, build_tokenizer
from mnemic.train.checkpoint import CheckpointWriter
from mnemic.train.errors import UserError
from mnemic.train.launch import check_resume
from mnemic.train.preflight import check_environment, check_optimizer
from mnemic.train.recipe.load import build_recipe

ACCELERATE = Path(__file__).parent.parent.parent / "recipes" / "accelerate"
NVME = ACCELERATE / "zero3_nvme.json"


@pytest.fixture
def deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(NVME))


def test_deepspeed_does_not_resume_from_nvme(deepspeed, tmp_path, monkeypatch):
    check_resume(None)
    with pytest.raises(UserError, match="which resumes"):
        check_resume(tmp_path / "step-00000002")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    check_resume(tmp_path / "step-00000002")


def test_an_offload_in_a_file_of_its_own_replaces_sgd_too(deepspeed, monkeypatch):
    with pytest.raises(UserError, match="puts its own Adam in the place of any other"):
        check_optimizer("sgd")
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    check_optimizer("sgd")
    check_optimizer("adamw")


@pytest.mark.parametrize("engine", [True, False])
def test_layers_are_recomputed_reentrantly_under_deepspeed_alone(engine, tmp_path, monkeypatch):
    """With parameters on NVMe the other way gives wrong gradients (measured, DeepSpeed 0.19.8)."""
    if engine:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    recipe = build_recipe(lm_tree(tmp_path, loop={"gradient_checkpointing": True}))
    model = build_model(recipe, build_tokenizer(recipe))
    found = [
        layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in model.model.layers
    ]
    assert found == [engine] * len(model.model.layers)


def test_a_streamed_run_is_one_process(tmp_path, monkeypatch, caplog):
    streamed = {"update": "streamed", "offload": "ssd"}
    recipe = build_recipe(lm_tree(tmp_path, **streamed))
    check_environment(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="streamed trains on one device"):
        check_environment(recipe)
    monkeypatch.delenv("WORLD_SIZE")
    loop = {"gradient_checkpointing": True}
    check_environment(build_recipe(lm_tree(tmp_path, **streamed, loop=loop)))
    assert "loop.gradient_checkpointing has no effect" in caplog.text


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_rollouts_are_not_written_by_shards(engine, tmp_path, monkeypatch):
    recipe = build_recipe({**grpo_tree(tmp_path, tmp_path), "model": {"kind": "tiny"}})
    check_environment(recipe)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"objective\.kind=grpo .*launch with DDP"):
        check_environment(recipe)


@pytest.mark.parametrize(("ranks", "fits"), [("2", True), ("1", False), ("4", False)])
def test_deepspeed_goes_on_with_as_many_ranks_as_wrote_the_checkpoint(
    ranks, fits, tmp_path, monkeypatch
):
    with CheckpointWriter(tmp_path, 4, engine="deepspeed", ranks=2) as temp:
        (temp / "trainer.pt").write_bytes(b"")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    start = tmp_path / "step-00000004"
    if fits:
        check_resume(start)
        return
    with pytest.raises(UserError, match=rf"written by 2 ranks of DeepSpeed.* over {ranks}; launch"):
        check_resume(start)


@pytest.mark.parametrize(("launched", "wrote"), [(True, None), (False, "deepspeed")])
def test_deepspeed_and_others_do_not_read_each_other(launched, wrote, tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path, 4, engine=wrote):
        pass
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    way = "without" if launched else "under"
    with pytest.raises(UserError, match=f"written {way} DeepSpeed.*resume it {way} DeepSpeed"):
        check_resume(tmp_path / "step-00000004")


@pytest.mark.parametrize(
    ("changes", "engine", "key"),
    [
        ({"optimizer": {"kind": "apollo", "rest": "adamw8bit"}}, "FSDP", r"optimizer\.rest"),
        ({"loop": {"batch_size": 3}}, "FSDP", r"loop\.batch_size=3 cannot be shared by 2"),
    ],
)
def test_what_shards_cannot_do_is_refused(changes, engine, key, tmp_path, monkeypatch):
    recipe = build_recipe(lm_tree(tmp_path, **changes))
    check_environment(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=key):
        check_environment(recipe)
