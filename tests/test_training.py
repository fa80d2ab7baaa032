"""Training: it learns, resumes exactly, stops cleanly, and refuses what it cannot do."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dilax import data
from dilax.corpus import load_corpus
from dilax.longnet import LongNetLM
from dilax.longnet_config import LongNetConfig
from dilax.train_config import TrainConfig, default_model
from dilax.training import evaluate, load_model, loss_sums, make_optimizer, train

MODEL = LongNetConfig(
    embed_dim=32,
    num_heads=2,
    num_layers=2,
    ffn_dim=48,
    segment_lengths=(16,),
    dilation_rates=(2,),
    vocab_size=data.VOCAB_SIZE,
    dropout=0.1,
    attention_dropout=0.1,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        lines = "".join(f"line {j} of file {i}: {'abc' * (j % 5)}\n" for j in range(12))
        (folder / f"{i}.txt").write_text(lines)
    return str(folder)


@pytest.fixture(scope="module")
def config(text):
    return TrainConfig(
        model=MODEL,
        text=(text,),
        sequence_length=64,
        batch_size=2,
        steps=8,
        learning_rate=0.01,
        warmup_steps=2,
        validation_rows=2,
        keep_checkpoints=2,
    )


@pytest.fixture(scope="module")
def uninterrupted(config):
    return train(config)


def _stop_at(step, how):
    def on_step(progress):
        if progress.step == step:
            how()

    return on_step


def _interrupt():
    raise KeyboardInterrupt


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", [_interrupt, _terminate])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(how, config, uninterrupted, tmp_path):
    """With dropout, over several epochs of six files, and stopped twice."""
    config = dataclasses.replace(config, checkpoint_dir=str(tmp_path / "run"))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    parts = [
        train(config, on_step=_stop_at(3, how)),
        train(config, resume=True, on_step=_stop_at(5, how)),
        train(config, resume=True),
    ]
    assert [part.step for part in parts] == [3, 5, 8]
    assert [part.interrupted for part in parts] == [True, True, False]
    assert parts[0].validation_bits_per_byte is None
    assert sum((part.bits_per_byte for part in parts), ()) == uninterrupted.bits_per_byte
    assert parts[2].validation_bits_per_byte == uninterrupted.validation_bits_per_byte
    leaves = (jax.tree.leaves(nnx.state(r.model, nnx.Param)) for r in (parts[2], uninterrupted))
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    loaded, saved = load_model(config.checkpoint_dir)
    assert saved == config
    rows = data.validation_batches(
        load_corpus(config.text).validation, sequence_length=64, batch_size=2, max_rows=2
    )
    assert evaluate(loaded, rows) == uninterrupted.validation_bits_per_byte


def test_it_learns_and_says_so(config, uninterrupted):
    bits = uninterrupted.bits_per_byte
    assert len(bits) == config.steps
    assert np.mean(bits[-2:]) < np.mean(bits[:2]) - 1
    assert uninterrupted.tokens > 0.5 * config.steps * 2 * 64
    corpus = load_corpus(config.text)
    rows = list(
        data.validation_batches(corpus.validation, sequence_length=64, batch_size=2, max_rows=2)
    )
    assert uninterrupted.bigram_bits_per_byte == data.bigram_bits_per_byte(
        data.bigram_counts(corpus.train), rows
    )


def test_progress_checkpoints_and_evaluations_come_as_configured(config, tmp_path):
    config = dataclasses.replace(
        config, checkpoint_dir=str(tmp_path), checkpoint_every=2, validate_every=4
    )
    seen = []
    result = train(config, on_step=seen.append)
    assert [p.step for p in seen] == list(range(1, 9))
    assert [p.step for p in seen if p.validation_bits_per_byte is not None] == [4, 8]
    assert seen[-1].validation_bits_per_byte == result.validation_bits_per_byte
    assert seen[-1].tokens == result.tokens
    rates = [p.learning_rate for p in seen]
    assert rates[2] == pytest.approx(0.01)
    assert rates[:3] == sorted(rates[:3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [6, 8]
    assert load_model(str(tmp_path), step=6)[1] == config
    with pytest.raises(ValueError, match=r"step: wanted one of \[6, 8\], got 5"):
        load_model(str(tmp_path), step=5)
    with pytest.raises(ValueError, match=r"checkpoint_dir: .* or resume=True"):
        train(config)
    with pytest.raises(ValueError, match=r"config: .*seed=0.*when resuming.*seed=1"):
        train(dataclasses.replace(config, seed=1), resume=True)
    other = tmp_path / "other"
    other.mkdir()
    changed = dataclasses.replace(config, text=(*config.text[:0], str(other)))
    for i in range(6):
        (other / f"{i}.txt").write_text("other text\n" * 40)
    with pytest.raises(ValueError, match=r"config: .*text"):
        train(changed, resume=True)


def test_changed_text_is_not_resumed(config, text, tmp_path):
    config = dataclasses.replace(config, checkpoint_dir=str(tmp_path / "run"))
    train(config, on_step=_stop_at(1, _interrupt))
    file = pathlib.Path(text) / "0.txt"
    before = file.read_bytes()
    file.write_bytes(before.swapcase())
    try:
        with pytest.raises(ValueError, match=r"text: .*unchanged"):
            train(config, resume=True)
    finally:  # the other tests read it too
        file.write_bytes(before)


def test_signals_are_left_alone_outside_the_main_thread(config):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(config, on_step=_stop_at(1, _interrupt)))
    )
    thread.start()
    thread.join()
    assert results[0].step == 1


def test_the_loss_is_that_of_predicted_tokens_only():
    model = LongNetLM(
        dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0), rngs=nnx.Rngs(0)
    )
    tokens = np.random.default_rng(0).integers(0, 256, (1, 13)).astype(np.int32)
    ids = np.array([[1] * 5 + [2] * 6 + [0] * 2], np.int32)
    positions = np.array([[*range(5), *range(6), 0, 0]], np.int32)
    batch = {"tokens": tokens, "segment_ids": ids, "positions": positions}
    sums = nnx.jit(loss_sums)
    total, number = sums(model, batch)
    assert int(number) == 4 + 5
    logits = nnx.jit(model)(tokens[:, :-1], segment_ids=ids[:, :-1], positions=positions[:, :-1])
    logp = np.asarray(jax.nn.log_softmax(logits))[0]
    exact = -sum(logp[i, tokens[0, i + 1]] for i in (0, 1, 2, 3, 5, 6, 7, 8, 9))
    assert float(total) == pytest.approx(exact, rel=1e-5)
    changed = {**batch, "tokens": tokens.copy()}
    changed["tokens"][0, 11:] = 7  # padding
    assert float(sums(model, changed)[0]) == pytest.approx(float(total), rel=1e-6)


def test_weight_decay_spares_norms_and_biases():
    config = TrainConfig(model=MODEL, steps=10, warmup_steps=0, weight_decay=0.5)
    model = LongNetLM(MODEL, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params = jax.tree.map(lambda x: x + 1.0, params)
    optimizer = make_optimizer(config)
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda x: optimizer.update(zero, optimizer.init(x), x))(params)
    decayed = {path[-1].key: bool((x != 0).all()) for path, x in jax.tree.leaves_with_path(updates)}
    assert decayed == {"kernel": True, "embedding": True, "bias": False, "scale": False}
    assert isinstance(optimizer, optax.GradientTransformation)


def test_configs_survive_json(config):
    fields = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(fields) == config
    assert TrainConfig().model == default_model()
    assert TrainConfig().sequence_length >= 4096


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": {}}, "model"),
        ({"model": dataclasses.replace(MODEL, vocab_size=256)}, "model.vocab_size"),
        ({"text": "file.txt"}, "text"),
        ({"text": ()}, "text"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"batch_size": 1.0}, "batch_size"),
        ({"steps": True}, "steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"final_learning_rate": -1.0}, "final_learning_rate"),
        ({"warmup_steps": 8}, "warmup_steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"beta2": 1.0}, "beta2"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"seed": -1}, "seed"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_rows": 0}, "validation_rows"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
    ],
)
def test_wrong_config_fields_are_refused_by_name(options, name, config):
    with pytest.raises(ValueError, match=rf"^{name}: wanted .*, got"):
        dataclasses.replace(config, **options)


def test_wrong_runs_are_refused_by_name(config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for changes, resume, message in (
        ({"text": (str(empty),)}, False, "text: wanted at least one file that is not empty"),
        ({"sequence_length": 1 << 16}, False, "sequence_length: wanted a batch"),
        ({}, True, "resume: wanted a checkpoint_dir"),
        ({"checkpoint_dir": str(tmp_path / "new")}, True, "resume: wanted a checkpoint_dir"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changes), resume=resume)
    for folder in (empty, tmp_path / "absent"):
        with pytest.raises(ValueError, match="checkpoint_dir: wanted a directory with checkpoints"):
            load_model(str(folder))
    with pytest.raises(ValueError, match="config: wanted a TrainConfig"):
        train({"steps": 3})
