"""Token sparsity by hooks: nothing changes when all is kept, and what is kept is right."""

from typing import Any

import architectures as a
import pytest
import torch

from mnemic.models.exact.attention import decoder_layers
from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.rows import documents, recount
from mnemic.models.tokens.sparsity import TokenSparsity

BATCHES = {
    "whole": lambda: {"input_ids": a.ids(2, 50)},
    "padded": lambda: a.padded([50, 31]),
    "packed": lambda: a.packed([20, 17, 13]),
}


def supervised(inputs: dict[str, Any], count: int = 6) -> torch.Tensor:
    """The last `count` real positions but one of each row predict something."""
    ids = inputs["input_ids"]
    ends = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else None
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(len(ids)):
        end = int(ends[row]) if ends is not None else ids.shape[1]
        found[row, end - count - 1 : end - 1] = True
    return found


def run(model: Any, inputs: dict[str, Any], sparsity: TokenSparsity | None = None) -> Any:
    if sparsity:
        assert sparsity.begin(inputs, supervised(inputs))
    return a.gradients(model, inputs)


# Scope, and what kept tokens attend to.
WAYS = {"gone": ("layer", "kept"), "visible": ("layer", "all"), "attention": ("attention", "kept")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", a.CONFIGS)
def test_keeping_all_changes_nothing(kind: str, batch: str, way: str) -> None:
    scope, attend = WAYS[way]
    inputs = BATCHES[batch]()
    model = a.small(kind)
    loss, grads = run(model, inputs)
    sparsity = TokenSparsity(
        model,
        TokensConfig(keep=1.0, layers=(1, 3), scope=scope, attend=attend, score="random", block=4),
    )
    found, others = run(model, inputs, sparsity)
    assert sparsity.report()["tokens/kept"] == 1.0
    if kind == "llama":
        assert torch.equal(found, loss)
        assert all(torch.equal(others[n], g) for n, g in grads.items())
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    a.close(others, grads, 1e-6)


@pytest.mark.parametrize("kind", a.CONFIGS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attend", ["kept", "all"])
def test_kept_tokens_are_at_their_own_places(kind: str, batch: str, attend: str) -> None:
    """The sparse layers, over the whole sequence with a mask that hides dropped tokens as keys (or,
    visible, does not), give what the hooks gave; dropped tokens pass by.
    """
    inputs = BATCHES[batch]()
    model = a.small(kind)
    config = TokensConfig(
        keep=0.5, layers=(1, 3), score="norm", block=1, sinks=4, recent=2, attend=attend
    )
    sparsity = TokenSparsity(model, config)
    layers = decoder_layers(model)
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any = None) -> None:
            value = args[0] if out is None else out[0] if isinstance(out, tuple) else out
            seen[name] = value.detach()

        return hook

    layers[0].register_forward_hook(note("before"), with_kwargs=True)
    layers[3].register_forward_pre_hook(note("after"), with_kwargs=True)
    run(model, inputs, sparsity)
    before, after = seen["before"], seen["after"]
    assert sparsity.forward is not None
    index = sparsity.forward.index[0]
    length = inputs["input_ids"].shape[1]
    assert index.shape[1] < 0.7 * length
    sparsity.active = False
    kept = torch.zeros_like(inputs["input_ids"], dtype=torch.bool).scatter_(1, index, True)
    # Dropped tokens ride the residual, to the last bit.
    assert torch.equal(after[~kept], before[~kept])
    calls: dict[int, Any] = {}
    for i in (1, 2):
        layers[i].register_forward_pre_hook(
            lambda m, args, kw, i=i: calls.__setitem__(i, (args, kw)), with_kwargs=True
        )
    with torch.no_grad():
        model(**inputs, use_cache=False)
        hidden = before
        for i in (1, 2):
            args, kwargs = calls[i]
            from mnemic.models.exact.attention import by_name

            named = by_name(layers[i], args[1:], kwargs)
            mask = named.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            elif mask.dtype != torch.bool:
                mask = mask == 0
            hidden_keys = kept[:, None, None, :] | torch.eye(length, dtype=torch.bool)
            named["attention_mask"] = mask & hidden_keys if attend == "kept" else mask
            out = layers[i](hidden, **named)
            out = out[0] if isinstance(out, tuple) else out
            hidden = torch.where(kept[..., None], out, hidden)
    real = kept if "attention_mask" not in inputs else kept & inputs["attention_mask"].bool()
    torch.testing.assert_close(after[real], hidden[real], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("score", ["attention", "lemo", "norm", "random", "window", "innovation"])
def test_recomputed_layers_have_the_same_tokens(way: str, score: str) -> None:
    inputs = BATCHES["padded"]()
    scope, attend = WAYS[way]
    config = TokensConfig(
        keep=0.4, layers=(1, 4), scope=scope, attend=attend, score=score, block=4, share=1
    )
    results = []
    for checkpointing in (None, False, True):
        model = a.small("llama")
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        sparsity = TokenSparsity(model, config)
        torch.manual_seed(3)
        results.append((run(model, inputs, sparsity), sparsity.forward))
    (loss, grads), first = results[0]
    for (other, others), forward in results[1:]:
        assert torch.equal(other, loss)
        assert all(torch.equal(first.index[i], forward.index[i]) for i in first.index)
        a.close(others, grads, 1e-6)


def test_supervised_tokens_sinks_and_the_end_always_stay() -> None:
    inputs = a.padded([50, 31])
    model = a.small("llama")
    config = TokensConfig(keep=0.2, layers=(1, 3), score="random", block=4, sinks=1, recent=1)
    sparsity = TokenSparsity(model, config)
    run(model, inputs, sparsity)
    kept = sparsity.kept
    wanted = supervised(inputs)
    assert bool(kept[wanted].all()) and bool(kept[:, 1:][wanted[:, :-1]].all())
    assert bool(kept[:, :4].all()) and bool(kept[0, 46:].all()) and bool(kept[1, 27:31].all())
    assert not bool(kept[1, 31:].any())  # padding
    report = sparsity.report()
    assert report["tokens/supervised_dropped"] == 0
    assert 0.5 < report["tokens/kept"] < 0.75 and report["tokens/kept_layer_1"] < 0.5


@pytest.mark.parametrize("attend", ["kept", "all"])
def test_what_is_saved_shrinks_with_what_is_kept(attend: str) -> None:
    """The custom scatter saves nothing: under checkpointing a run saves kept tokens only, and what
    the others were left with once.
    """
    inputs = {"input_ids": a.ids(1, 64)}

    def saved(keep: float | None) -> int:
        model = a.small("llama")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if keep is not None:
            config = TokensConfig(keep=keep, layers=(1, 4), score="random", block=8, attend=attend)
            sparsity = TokenSparsity(model, config)
            sparsity.begin(inputs, supervised(inputs, 2))
        storages: dict[int, Any] = {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and tensor.is_floating_point():
                storages[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        assert hidden.requires_grad
        return sum(s.nbytes() for s in storages.values())

    row = 64 * 32 * 4
    left = row if attend == "all" else 0
    assert saved(0.25) <= saved(None) - 3 * row + 3 * row // 4 + row // 2 + left


def test_batches_of_one_step_differ_and_a_resumed_step_repeats() -> None:
    inputs = BATCHES["whole"]()
    config = TokensConfig(keep=0.4, layers=(1, 3), score="random", block=4)

    def sets(model: Any, sparsity: TokenSparsity, seed: int, count: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        found = []
        for _ in range(count):
            run(model, inputs, sparsity)
            assert sparsity.forward is not None
            found.append(sparsity.forward.index[0])
        return found

    model = a.small("llama")
    sparsity = TokenSparsity(model, config)
    first = sets(model, sparsity, 1, 2)
    assert not torch.equal(first[0], first[1])
    second = sets(model, sparsity, 2, 2)
    assert not torch.equal(first[0], second[0])
    fresh = a.small("llama")
    again = sets(fresh, TokenSparsity(fresh, config), 2, 2)
    assert all(torch.equal(x, y) for x, y in zip(second, again, strict=True))


def test_evaluation_generation_and_a_dense_schedule_are_dense() -> None:
    inputs = {"input_ids": a.ids(1, 40)}
    model = a.small("llama").eval()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        text = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    config = TokensConfig(keep=0.3, score="random", block=4, ramp=0.4, dense_end=0.2)
    sparsity = TokenSparsity(model, config)
    with torch.no_grad():
        assert not sparsity.begin(inputs, supervised(inputs))
        assert torch.equal(model(**inputs, use_cache=False).logits, logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), text)
    model.train()
    assert sparsity.begin(inputs, supervised(inputs))
    shares = [config.keep_at(p) for p in (0, 0.4, 0.6, 0.8, 1.0)]
    assert shares == pytest.approx([0.3, 0.3, 0.65, 1.0, 1.0])
    sparsity.progress = 0.9
    assert not sparsity.begin(inputs, supervised(inputs))
    assert sparsity.report() == {"tokens/kept": 1.0, "tokens/supervised_dropped": 0.0}


def test_flash_attentions_documents_are_counted_anew() -> None:
    cumulative = documents(torch.cat([torch.arange(n) for n in (5, 3, 4)])[None])
    assert cumulative.tolist() == [0, 5, 8, 12]
    index = torch.tensor([[0, 2, 4, 9, 11]])  # nothing of the second document is left
    lengths, longest = recount(cumulative, index)
    assert lengths.tolist() == [0, 3, 5] and longest == 3 and lengths.dtype == torch.int32


def test_gathered_positions_are_never_passed_on() -> None:
    """transformers would read gaps in them as documents."""
    model = a.small("llama")
    config = TokensConfig(keep=0.4, layers=(1, 3), score="random", block=4, attend="kept")
    sparsity = TokenSparsity(model, config)
    seen = []
    layer = decoder_layers(model)[1]
    layer.self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    run(model, BATCHES["packed"](), sparsity)
    assert seen[-1]["position_ids"] is None
    assert seen[-1]["attention_mask"] is not None  # documents stay apart by the mask


def test_dropped_targets_leave_the_loss_and_the_rest_stands_for_all() -> None:
    inputs = BATCHES["whole"]()
    model = a.small("llama")
    config = TokensConfig(
        keep=0.4, layers=(1, 4), score="random", block=4, protect=False, sinks=0, recent=0
    )
    sparsity = TokenSparsity(model, config)
    run(model, inputs, sparsity)
    dropped = sparsity.loss_dropped()
    assert dropped is not None and sparsity.forward is not None
    predicting, wanted = supervised(inputs), sparsity.forward.row.supervised
    expected = predicting.sum() / (predicting & ~dropped).sum()
    assert float(sparsity.loss_factor) == pytest.approx(float(expected)) and expected > 1
    assert sparsity.report()["tokens/supervised_dropped"] == float((wanted & dropped).sum()) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_visible_tokens_have_the_exact_backward_of_their_forward(
    kind: str, batch: str, checkpointing: bool
) -> None:
    """Against autograd through whole layers whose output replaces that of kept tokens only."""
    inputs = BATCHES[batch]()
    model = a.small(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = TokensConfig(keep=0.5, layers=(1, 3), score="norm", block=1, sinks=2, recent=2)
    sparsity = TokenSparsity(model, config)
    loss, grads = run(model, inputs, sparsity)
    kept = sparsity.kept[..., None]
    reference = a.small(kind)

    def pass_by(module: Any, args: Any, out: Any) -> Any:
        return torch.where(kept, out, args[0])

    for layer in decoder_layers(reference)[1:3]:
        layer.register_forward_hook(pass_by)
    expected_loss, expected = a.gradients(reference, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    a.close(grads, expected, 3e-6)
