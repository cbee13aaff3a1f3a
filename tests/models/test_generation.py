"""Generation: samples do not depend on the batch, follow the softmax, and use no hidden setting."""

import torch

from mnemic.models.generation import Draws, generate
from mnemic.models.tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer(256)
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def model():
    return tiny_llama(TOKENIZER, hidden_size=32, layers=2, heads=4, max_position=256, seed=0)


def sample(made, prompts, seeds, **more):
    found = generate(made, prompts, eos_id=EOS, pad_id=PAD, max_new_tokens=12, seeds=seeds, **more)
    return [one.ids for one in found]


def test_a_sample_depends_on_its_seed_and_not_on_the_batch():
    made = model()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11] * 20]
    together = sample(made, prompts, [7, 8, 9])
    alone = [sample(made, [p], [s])[0] for p, s in zip(prompts, [7, 8, 9], strict=True)]
    split = sample(made, prompts, [7, 8, 9], batch_size=2)
    assert together == alone == split
    assert sample(made, prompts, [7, 8, 10])[:2] == together[:2]
    assert sample(made, prompts, [7, 8, 10])[2] != together[2]


def test_draws_are_of_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for temperature in (1.0, 0.5):
        draws = Draws([5], 20000, temperature)
        drawn = torch.stack([draws(None, logits).argmax(-1)[0] for _ in range(20000)])
        found = torch.bincount(drawn, minlength=4) / 20000
        assert torch.allclose(found, (logits / temperature).softmax(-1)[0], atol=0.012)


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 3] = 0.0
    draws = Draws([1], 200, 1.0)
    assert all(int(draws(None, logits).argmax(-1)) == 3 for _ in range(200))


def test_the_models_own_generation_settings_do_not_count_and_stay_as_they_were():
    plain, odd = model(), model()
    odd.generation_config.repetition_penalty = 5.0
    odd.generation_config.max_length = 20
    prompts = [[1, 2, 3, 1, 2, 3]]
    assert sample(odd, prompts, None) == sample(plain, prompts, None)
    assert odd.generation_config.repetition_penalty == 5.0


def test_the_models_own_end_tokens_end_a_turn_too():
    made = model()
    (first,) = sample(made, [[1, 2, 3]], None)
    made.generation_config.eos_token_id = [EOS, first[3]]
    (found,) = generate(made, [[1, 2, 3]], eos_id=EOS, pad_id=PAD, max_new_tokens=12)
    assert found.ids == first[: first.index(first[3]) + 1] and not found.cut


def test_a_text_without_an_end_is_cut_and_modes_stay_as_they_were():
    made = model()
    made.train()
    made.model.layers[0].eval()
    (found,) = generate(made, [[1]], eos_id=EOS, pad_id=PAD, max_new_tokens=2)
    assert found.cut and len(found.ids) == 2
    assert made.training and not made.model.layers[0].training
