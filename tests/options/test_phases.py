"""Phases of a run: other shares and other rows from a step on, the same rows before it whatever is added later."""

import json
import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.data_plan import describe_phases, open_plan
from pretrain.data.packing import PACKING_VERSIONS
from pretrain.data.row_reader import IGNORED_TARGET
from pretrain.data.shards import load_index
from pretrain.data.stream import TokenStream, ValRows
from pretrain.errors import DataError
from pretrain.options.batch_plan import BatchPlan
from pretrain.options.config import Config
from pretrain.options.families import flops_per_token, resolve_shape
from pretrain.options.phases import phases_of, sampling_weights
from pretrain.options.settings import load_config
from pretrain.training.run import flops_by_length
from tests.helpers.data_helpers import PAD, TOKENIZER, batch_plan, flip_bit, make_config, make_corpus, random_documents
from tests.helpers.rank_helpers import ROOT, losses, metric_lines, prepare, run_cases

GLOBAL_BATCH, NUM_STEPS = 12, 9
FIELDS = ("tokens_BT", "targets_BT", "doc_start_BT", "row_ids_B")
PHASES: list[dict[str, Any]] = [
    {"from_step": 3, "weights": {"web": 0.2, "code": 0.5, "books": 0.3}, "seq_len": 64},
    {"from_step": 5, "epochs": {"code": 1.0, "books": 2.0}},
    {"from_step": 7, "seq_len": 16},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name, seed in (("web", 1), ("code", 2), ("books", 3)):
        documents = random_documents(120, seed), random_documents(15, seed + 10)
        make_corpus(root / name, *documents, seq_lens=(16, 32, 64), packings=sorted(PACKING_VERSIONS))
    return {root / "web": 0.8, root / "code": 0.2, root / "books": 0.0}


def config_of(folders, phases=PHASES, global_batch_size=GLOBAL_BATCH, **data) -> Config:
    config = make_config(folders, phases=phases, **data)
    train = config.train.model_copy(update={"global_batch_size": global_batch_size, "num_steps": NUM_STEPS})
    return config.model_copy(update={"train": train})


def make_stream(folders, rank=0, world_size=1, micro_batch_size=2, global_batch_size=GLOBAL_BATCH, **data):
    sizes = batch_plan(global_batch_size, world_size, micro_batch_size, seq_len=32)
    config = config_of(folders, global_batch_size=global_batch_size, **data)
    return TokenStream(config, sizes, rank, TOKENIZER)


def global_steps(folders, num_steps, state=None, world_size=1, num_read_ahead=0, **options):
    """Runs all ranks; returns each step's rows over the ranks in order, and the state at the end."""
    streams = [make_stream(folders, rank, world_size, **options) for rank in range(world_size)]
    for one in streams:
        if state is not None:
            one.load_state(json.loads(json.dumps(state)))
    steps = []
    for _ in range(num_steps):
        batches = [batch for one in streams for batch in one.next_step().micro_batches]
        steps.append(tuple(torch.cat([getattr(batch, field) for batch in batches]) for field in FIELDS))
    state = streams[0].state()
    for one in streams:
        for _ in range(num_read_ahead):  # taken, trained on, and lost in a crash before a checkpoint
            one.next_step()
        one.close()
    return steps, state


def assert_same(steps, expected):
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(step, other, strict=True))


@pytest.fixture(scope="module")
def reference(folders):
    return global_steps(folders, NUM_STEPS)[0]


def test_phases_begin_at_the_rows_of_their_steps(folders):
    phases = phases_of(config_of(folders))
    assert [(one.first_step, one.first_row, one.seq_len, one.rows_per_step) for one in phases] == [
        (0, 0, 32, 12), (3, 36, 64, 6), (5, 48, 64, 6), (7, 60, 16, 24),
    ]  # fmt: skip
    assert [one.kind for one in phases] == ["weights", "weights", "epochs", "epochs"]
    assert [sorted(one.amounts) for one in phases] == [
        ["code", "web"], ["books", "code", "web"], ["books", "code"], ["books", "code"],
    ]  # fmt: skip
    assert phases[1].option.format("web") == "data.phases.0.weights[web]" and phases[3].option == phases[2].option
    weights = sampling_weights(config_of(folders))
    assert weights == {"web": 0.8, "code": 0.5, "books": pytest.approx(2 / 3)}
    assert sampling_weights(config_of(folders, phases=[])) == {"web": 0.8, "code": 0.2}


def test_a_phase_whose_first_rows_are_left_out_begins_behind_them(folders):
    stream = make_stream(folders)
    begun = []
    for number in range(7):
        stream.next_step()
        begun.append(stream.phase_begun())
        if number == 1:
            stream.skip([(24, 42)])  # the last step of the first phase, and the first one of the second
    stream.close()
    assert begun == [0, 0, 2, 3, 0, 4, 0]


def test_rows_of_each_phase_have_its_length_and_sources(folders, reference):
    assert [tuple(step[0].shape) for step in reference] == [(12, 32)] * 3 + [(6, 64)] * 4 + [(24, 16)] * 2
    assert torch.equal(torch.cat([step[3] for step in reference]), torch.arange(3 * 12 + 4 * 6 + 2 * 24))
    plan = open_plan(config_of(folders), TOKENIZER)[0]
    assert plan.names == ["web", "code", "books"]
    tokens = plan.tokens_per_corpus(36 + 24 + 48)
    assert sum(tokens.values()) == NUM_STEPS * GLOBAL_BATCH * 32 and plan.tokens_per_corpus(36)["books"] == 0


PARTS = st.tuples(
    st.integers(0, 4), st.sampled_from([1, 2, 3]), st.sampled_from([2, 4]), st.integers(1, 3), st.integers(0, 2)
).filter(lambda part: GLOBAL_BATCH // part[1] % part[2] == 0)


@given(st.lists(PARTS, min_size=1, max_size=4))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_of_a_run_with_phases_gives_the_same_global_batches(folders, reference, parts):
    steps, state = [], None
    for num_steps, world_size, micro_batch_size, prefetch_steps, num_read_ahead in parts:
        more, state = global_steps(
            folders, min(num_steps, NUM_STEPS - len(steps)), state, world_size, num_read_ahead,
            micro_batch_size=micro_batch_size, prefetch_steps=prefetch_steps,
        )  # fmt: skip
        steps += more
    assert_same(steps, reference[: len(steps)])


@pytest.mark.parametrize("num_phases", [0, 1, 2])
def test_phases_may_be_added_up_to_the_checkpoint_and_none_before_it(folders, reference, num_phases):
    boundary = PHASES[num_phases]["from_step"]
    steps, state = global_steps(folders, boundary, phases=PHASES[:num_phases])
    more, end = global_steps(folders, NUM_STEPS - boundary, state)
    assert_same(steps + more, reference)
    assert len(json.dumps(end)) < 6000
    past = global_steps(folders, boundary + 1, phases=PHASES[:num_phases])[1]
    with pytest.raises(
        DataError, match=rf"differs from the checkpoint's: data\.phases\.{num_phases}: .* was absent and"
    ):
        make_stream(folders).load_state(past)


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"from_step": 2}, r"data\.phases\.0: its first row was 36 and is 24"),
        (
            {"weights": {"web": 0.4, "code": 0.5, "books": 0.1}},
            r"data\.phases\.0: share of books was 1229/4096 and is 410/",
        ),
        ({"seq_len": 16}, r"data\.phases\.0: data.seq_len was 64 and is 16"),
        (
            {"weights": {"web": 0.2, "code": 0.8}},
            r"data\.phases\.0: data.sources was web, code, books and is web, code",
        ),
    ],
)
def test_a_phase_that_has_begun_cannot_change(folders, change, clause):
    state = global_steps(folders, 4)[1]
    other = make_stream(folders, phases=[PHASES[0] | change, *PHASES[1:]])
    with pytest.raises(DataError, match=f"{clause}.*run\\.dir"):
        other.load_state(state)
    earlier = global_steps(folders, 2)[1]
    other.load_state(earlier)  # before it begins, it can


def test_a_step_is_not_cut_by_rows_of_another_length(folders):
    _, state = global_steps(folders, 2, phases=[])
    text = (
        r"data\.phases: rows of 64 tokens begin at row 30, inside of a step of 10 rows; expected the end of one\. Put back "
        r"the train\.global_batch_size that the checkpoint at row 24"
    )
    with pytest.raises(DataError, match=text):
        make_stream(folders, global_batch_size=10).load_state(state)


def test_held_out_rows_have_one_length_in_every_phase(folders):
    with_phases, without = (ValRows(config_of(folders, phases=phases), TOKENIZER, 0) for phases in (PHASES, []))
    numbers = list(range(with_phases.num_rows))
    assert with_phases.num_rows == without.num_rows
    assert torch.equal(with_phases.batch(numbers).tokens_BT, without.batch(numbers).tokens_BT)


@pytest.mark.parametrize("packing", sorted(PACKING_VERSIONS))
def test_tokens_in_are_tokens_out_for_every_packing(folders, packing):
    web = {next(iter(folders)): 1.0}
    stream = make_stream(web, phases=[], packing=packing)
    num_rows = stream.plan.epoch_rows_at(0)["web"]
    batches = [batch for _ in range(-(-num_rows // GLOBAL_BATCH)) for batch in stream.next_step().micro_batches]
    stream.close()
    tokens_BT, targets_BT, doc_start_BT = (
        torch.cat([getattr(batch, field) for batch in batches])[:num_rows] for field in FIELDS[:3]
    )
    num_scored, documents = int((targets_BT != IGNORED_TARGET).sum()), random_documents(120, 1)
    assert num_scored == sum(len(one) - 1 for one in documents)
    assert num_scored + int((targets_BT == IGNORED_TARGET).sum()) == num_rows * 32
    num_begun = [len(set(row[row_targets != IGNORED_TARGET].tolist()))
                 for row, row_targets in zip(doc_start_BT, targets_BT, strict=True)]  # fmt: skip
    assert max(num_begun) == 1 if packing == "document" else max(num_begun) > 1
    follows = doc_start_BT[:, 1:] == doc_start_BT[:, :-1]
    scored = (targets_BT != IGNORED_TARGET)[:, :-1] & follows
    assert torch.equal(tokens_BT[:, 1:][scored], targets_BT[:, :-1][scored])


@given(
    st.sampled_from(sorted(PACKING_VERSIONS)), st.integers(0, 119), st.floats(0, 1, exclude_max=True), st.integers(0, 1)
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_changes_only_rows_with_its_document(folders, packing, number, place, offset):
    web = next(iter(folders))
    corpora = open_plan(config_of({web: 1.0}, phases=[], packing=packing), TOKENIZER)[1]
    block = 0
    while number >= corpora[0].shards[block].num_documents:
        number, block = number - corpora[0].shards[block].num_documents, block + 1
    shard = corpora[0].shards[block]
    record = load_index(web, shard)[number]
    position = int(record["offset"]) + 2 * int(place * int(record["num_tokens"])) + offset
    num_steps = -(-corpora[0].rows[32].num_rows // GLOBAL_BATCH)
    whole = global_steps({web: 1.0}, num_steps, phases=[], packing=packing)[0]
    flip_bit(web / f"{shard.name}.tar", position)
    try:
        stream = make_stream({web: 1.0}, phases=[], packing=packing)
        names = f"{web}/{shard.name}.tar document {number} in row "
        for expected in whole:
            rows = stream.next_step()
            tokens_BT, targets_BT, doc_start_BT, row_ids_B = (
                torch.cat([getattr(batch, field) for batch in rows.micro_batches]) for field in FIELDS
            )
            assert torch.equal(doc_start_BT, expected[2]) and torch.equal(row_ids_B, expected[3])
            changed = (targets_BT != expected[1]) | (tokens_BT != expected[0])
            assert set(row_ids_B[changed.any(dim=1)].tolist()) == {one.row for one in rows.damaged}
            assert all(str(one).startswith(f"{names}{one.row}: bytes ") for one in rows.damaged)
            assert (targets_BT[changed] == IGNORED_TARGET).all() and (tokens_BT[changed] == PAD).all()
        stream.close()
    finally:
        flip_bit(web / f"{shard.name}.tar", position)


def test_phases_are_described_with_shares_and_epochs(folders):
    config = config_of(folders)
    plan = open_plan(config, TOKENIZER)[0]
    lines = describe_phases(plan, phases_of(config), NUM_STEPS)
    web = plan.epochs(36)["web"]
    assert lines[0].startswith(f"steps 1 to 3, rows of 32 tokens: web 80.00% ({web:.2f} epochs), code 20.00% (0.0")
    assert lines[2].startswith("steps 6 to 7, rows of 64 tokens: code ")
    asked = (plan.epoch_rows_at(48)["code"] + 2 * plan.epoch_rows_at(48)["books"]) / 6
    assert lines[2].endswith(f"; the epochs that it asks for take {asked:.0f} steps, and it has 2")
    assert lines[3].startswith("steps 8 to 9, rows of 16 tokens: ") and "asks for" not in lines[3]


def test_epochs_and_tokens_of_sources_are_what_the_run_sees(folders):
    config = config_of({folder: 1.0 for folder in folders}, phases=[])
    sizes = open_plan(config, TOKENIZER)[0].epoch_rows_at(0)
    for key, amounts in (("epochs", (1.0, 3.0, 0.5)), ("tokens", (4e5, 1e5, 2e5))):
        sources = [source.model_copy(update={key: amount})
                   for source, amount in zip(config.data.sources, amounts, strict=True)]  # fmt: skip
        own = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
        plan, phases = open_plan(own, TOKENIZER)[0], phases_of(own)
        asked = dict(zip(sizes, amounts, strict=True))
        rows = {name: asked[name] * (size if key == "epochs" else 1 / 32) for name, size in sizes.items()}
        seen = plan.epochs(round(sum(rows.values())))
        assert all(seen[name] == pytest.approx(rows[name] / sizes[name], rel=0.02) for name in sizes)
        num_steps = round(sum(rows.values()) / GLOBAL_BATCH)
        assert "asks for" not in describe_phases(plan, phases, num_steps)[0]
        text = f"; the {key} that it asks for take {num_steps} steps, and it has {2 * num_steps}"
        assert text in describe_phases(plan, phases, 2 * num_steps)[0]


def test_a_state_does_not_depend_on_ranks_and_hardly_on_the_row(folders):
    state = global_steps(folders, 4)[1]
    assert global_steps(folders, 4, world_size=3)[1] == state
    far = make_stream(folders)
    far.load_state({**state, "plan_hash": far.plan.hash, "cursor": 60 + 24 * 10**7})
    far.next_step()
    assert abs(len(json.dumps(far.state())) - len(json.dumps(state))) < 100


def test_the_example_of_the_docs_is_a_config(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    example = next(part for part in page.split("```") if part.startswith("yaml") and "phases:" in part)
    rest = "model: {dim: 64, num_layers: 1, num_heads: 4}\ntokenizer: {model: t, vocab_size: 512}\noptim: {lr: 1e-3}\n"
    (tmp_path / "run.yaml").write_text(example.removeprefix("yaml") + rest)
    config = load_config(tmp_path / "run.yaml")
    assert [(one.first_row, one.rows_per_step, one.seq_len) for one in phases_of(config)] == [
        (0, 256, 2048), (8000 * 256, 256, 2048), (9500 * 256, 64, 8192),
    ]  # fmt: skip
    assert config.data.seq_lens == [2048, 8192] and BatchPlan.of(config, 4).for_seq_len(8192).micro_batch_size == 2


def test_flops_are_counted_for_the_rows_of_a_phase(folders):
    shape = resolve_shape(config_of(folders).model, 1000, 64)
    flops = flops_by_length(shape, [16, 64])
    assert flops[64] == (flops_per_token(shape, causal=False), flops_per_token(shape, causal=True))
    attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim
    assert [flops[64][i] - flops[16][i] for i in (0, 1)] == [48 * attention, 24 * attention]


@pytest.mark.launches
def test_runs_go_through_phases_and_may_get_more_of_them(tiny_config, tmp_path):
    shutil.copytree(tiny_config.parent / "shards", tmp_path / "shards")
    sources = [f"{{name: {name}, shards: {tmp_path}/shards/{name}, weight: {weight}}}"
               for name, weight in (("code", 3), ("prose", 0))]  # fmt: skip
    first = "{from_step: 3, weights: {prose: 1, code: 3}, seq_len: 64}"
    second = "{from_step: 5, epochs: {code: 1}, seq_len: 16}"
    common = [f"data.sources=[{', '.join(sources)}]", "schedule={name: constant}", "train.num_steps=8",
              "eval={every_steps: 4, max_rows: 8}", "model.attention_dropout=0.1"]  # fmt: skip
    both, one = f"data.phases=[{first}, {second}]", f"data.phases=[{first}]"
    changed = one.replace("code: 3}", "code: 2}")
    prepare(tiny_config, *common, both)
    cases = [
        ["run.dir={}/whole", both],
        ["run.dir={}/begun", one, "train.num_steps=4"],
        ["run.dir={}/begun", changed],
        ["run.dir={}/begun", both, "train.micro_batch_size=8"],
        ["run.dir={}/learned", both, "model={family: gpt2, dim: 32, num_layers: 2, num_heads: 4}"],
    ]
    listed = [{"overrides": [*common, *(option.format(tmp_path) if "run.dir" in option else option for option in case)]}
              for case in cases]  # fmt: skip
    outcomes = run_cases(tiny_config, listed, 1, tmp_path / "ranks")
    assert [outcome[:4] for outcome in outcomes] == ["done", "done", "Data", "done", "done"], outcomes
    assert "data.phases.0: share of code was 3072/4096 and is 2731/4096" in outcomes[2]
    whole, begun = losses(tmp_path / "whole"), losses(tmp_path / "begun")
    assert whole[:4] == begun[:4] and whole == pytest.approx(begun, rel=1e-4) and len(whole) == 8
    lines = metric_lines(tmp_path / "whole")
    steps = [line for line in lines if "loss" in line]
    assert [line["tokens"] for line in steps] == [512 * step for step in range(1, 9)]
    assert [line["tokens/code"] + line["tokens/prose"] for line in steps] == [line["tokens"] for line in steps]
    assert [line["tokens/prose"] for line in steps] == [0, 0, 0, 128, 256, 256, 256, 256]
    texts = [line["message"] for line in lines if line.get("event") in ("mixture", "phase")]
    assert texts[0].startswith("phase 1 of 3: steps 1 to 3, rows of 32 tokens: code 100.00% (")
    assert texts[3:] == [f"phase {number} of 3 has begun with this step" for number in (2, 3)]
