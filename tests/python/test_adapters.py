"""The adapters for TRL and open-instruct against a real worker. Neither is installed: both are stood in for here, by as
much of their interface as python/examples/{trl_rollout,open_instruct_engine}.py say they were written against."""

import dataclasses
import functools
import importlib
import queue
import sys
import time
import types

import numpy as np
import pytest
import transformers

from lockstep import RolloutClient, text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def examples(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root / "python" / "examples"))


@pytest.fixture(scope="module")
def fp32_worker(start_worker, tiny_model):
    return start_worker(tiny_model, "--numerics", "fp32")


@pytest.fixture(scope="module")
def client(fp32_worker):
    with RolloutClient(fp32_worker.data) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return text.load_tokenizer(tiny_model)


@pytest.fixture
def model(tiny_model):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")


def assert_scores_equal(client, prompts, completions, logprobs, temperature):
    again = client.score([[*p, *c] for p, c in zip(prompts, completions, strict=True)], temperature=temperature)
    for completion, values, want in zip(completions, logprobs, again, strict=True):
        assert np.array_equal(np.float32(values), want[-len(completion) :])


# TRL


class Processing:
    """A processing class, as far as prompts go."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text):
        return {"input_ids": [self.tokenizer.encode(t).ids for t in text]}

    def apply_chat_template(self, conversation, *, add_generation_prompt, tokenize, return_dict, chat_template):
        assert add_generation_prompt and tokenize and return_dict and chat_template is None
        return self(["".join(message["content"] for message in messages) for messages in conversation])


class Accelerator:
    process_index, is_main_process = 0, True
    waits = 0

    def unwrap_model(self, model):
        return model

    def wait_for_everyone(self):
        self.waits += 1


@pytest.fixture
def trainer(model, tokenizer):
    sampling = {"max_completion_length": 8, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": None}
    return types.SimpleNamespace(
        **sampling,
        repetition_penalty=1.0,
        model=model,
        accelerator=Accelerator(),
        state=types.SimpleNamespace(global_step=0),
        processing_class=Processing(tokenizer),
        chat_template=None,
        chat_template_kwargs={},
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )


@pytest.fixture
def rollout(fp32_worker):
    module = importlib.import_module("trl_rollout")
    rollout = module.LockstepRollout([fp32_worker.data], [fp32_worker.control], seed=3)
    yield rollout
    rollout.close()


def version(client):
    (info,) = client.info().values()
    return info.weight_version.epoch, info.weight_version.step


def test_trl_rollout(rollout, trainer, client, tokenizer):
    prompts = ["37+45="] * 3 + ["6*38="] * 3 + ["In the beginning"] * 3
    out = rollout(prompts, trainer)
    assert set(out) == {"prompt_ids", "completion_ids", "logprobs"}
    assert out["prompt_ids"] == [tokenizer.encode(p).ids for p in prompts]
    assert len(out["completion_ids"]) == len(out["logprobs"]) == 9
    assert all(1 <= len(c) <= 8 for c in out["completion_ids"])
    assert len({tuple(c) for c in out["completion_ids"][6:]}) > 1, "a group's samples are draws of their own"
    assert_scores_equal(client, out["prompt_ids"], out["completion_ids"], out["logprobs"], 0.7)


def test_trl_weights_are_published_once_a_step(rollout, trainer, client):
    epoch = version(client)[0] + 1
    rollout(["37+45="], trainer)
    assert version(client) == (epoch, 0)
    trainer.model.model.norm.weight.data.mul_(1.1)
    before = rollout(["In the beginning"] * 2, trainer)  # the same step: the same weights
    assert version(client) == (epoch, 0) and trainer.accelerator.waits == 1
    trainer.state.global_step = 4
    after = rollout(["In the beginning"] * 2, trainer)
    assert version(client) == (epoch, 4) and trainer.accelerator.waits == 2
    assert_scores_equal(client, after["prompt_ids"], after["completion_ids"], after["logprobs"], 0.7)
    old = client.score([[*before["prompt_ids"][0], *before["completion_ids"][0]]], temperature=0.7)[0]
    assert not np.array_equal(np.float32(before["logprobs"][0]), old[-len(before["logprobs"][0]) :])


def test_trl_messages_uneven_groups_and_refusals(rollout, trainer, client):
    messages = [[{"role": "user", "content": c}] for c in ("37+45=", "37+45=", "6*38=")]
    out = rollout(messages, trainer)
    assert len(out["completion_ids"]) == 3 and out["prompt_ids"][0] == out["prompt_ids"][1] != out["prompt_ids"][2]
    assert_scores_equal(client, out["prompt_ids"], out["completion_ids"], out["logprobs"], 0.7)
    trainer.state.global_step, trainer.is_fsdp_enabled = 1, True
    with pytest.raises(ValueError, match="not FSDP"):
        rollout(["37+45="], trainer)
    trainer.is_fsdp_enabled, trainer.model.peft_config = False, {}
    with pytest.raises(ValueError, match="PEFT"):
        rollout(["37+45="], trainer)


# open-instruct


@dataclasses.dataclass
class SamplingConfig:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 8
    min_tokens: int = 0
    n: int = 2
    stop: list | None = None
    seed: int | None = None
    logprobs: int | None = 1


@pytest.fixture
def open_instruct(monkeypatch):
    """open_instruct.data_types: results keep what they are made with. deepspeed and ray: just enough to be imported."""
    data_types = types.SimpleNamespace(
        GenerationResult=lambda **fields: types.SimpleNamespace(reward_scores=None, **fields),
        RequestInfo=types.SimpleNamespace,
        TokenStatistics=types.SimpleNamespace,
    )
    monkeypatch.setitem(sys.modules, "open_instruct", types.SimpleNamespace(data_types=data_types))
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace())
    remote = lambda function: types.SimpleNamespace(remote=function)  # noqa: E731

    class Handle:  # of an actor, in this process
        def __init__(self, actor):
            self.actor = actor

        def __getattr__(self, name):
            return remote(getattr(self.actor, name))

    def actor_of(cls):
        made = remote(lambda *args, **kwargs: Handle(cls(*args, **kwargs)))
        return types.SimpleNamespace(options=lambda **_: made)

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(remote=actor_of, get=lambda value: value))
    return importlib.import_module("open_instruct_engine")


class Text:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def batch_decode(self, responses, skip_special_tokens):
        return text.decode(self.tokenizer, responses, skip_special_tokens)


class Reward:
    def build(self):
        return self.reward

    async def reward(self, responses, decoded, truths, sources, finish_reasons, infos, queries):
        assert len(responses) == len(infos.timeouts) == len(infos.rollout_states) == len(queries)
        assert set(sources) == {"sums"} and set(finish_reasons) <= {"stop", "length"}
        return [float(d.strip() == t) for d, t in zip(decoded, truths, strict=True)], {"seen": len(decoded)}


ROWS = [
    {"index": 7, "ground_truth": "82", "dataset": "sums", "prompt": "37+45="},
    {"index": 5, "ground_truth": "228", "dataset": "sums", "prompt": "6*38="},
]


@pytest.fixture
def engine(open_instruct, fp32_worker, tokenizer):
    queues = {name: queue.Queue() for name in ("prompt_queue", "results_queue", "eval_results_queue")}
    manager = types.SimpleNamespace(stop=False)
    manager.should_stop = types.SimpleNamespace(remote=lambda: manager.stop)
    engine = open_instruct.LockstepEngine(
        [fp32_worker.data],
        Text(tokenizer),
        **queues,
        actor_manager=manager,
        reward_config=Reward(),
        train_dataset=ROWS,
        eval_dataset=ROWS[:1],
    )
    yield types.SimpleNamespace(engine=engine, manager=manager, **queues)
    engine.close()


def request_of(tokenizer, row, **fields):
    given = {"generation_config": SamplingConfig(), "is_eval": False, "active_tools": None, "ground_truth": None}
    given |= {"env_config": types.SimpleNamespace(env_configs={}), "prompt_id": f"0_{row['index']}"} | fields
    return types.SimpleNamespace(prompt=tokenizer.encode(row["prompt"]).ids, index=row["index"], **given)


def test_open_instruct_results(engine, client, tokenizer):
    assert engine.engine.ready() and engine.engine.get_kv_cache_info() >= 2
    greedy = SamplingConfig(temperature=0.0, n=1)
    engine.prompt_queue.put(request_of(tokenizer, ROWS[0], is_eval=True, generation_config=greedy))
    result = engine.eval_results_queue.get(timeout=60)
    assert result.finish_reasons == ["stop"] and result.index == 7 and result.prompt_id == "0_7"
    assert engine.results_queue.empty()

    config = SamplingConfig(temperature=0.9, n=3, seed=4)
    for row in ROWS:
        engine.prompt_queue.put(request_of(tokenizer, row, generation_config=config))
    results = {r.index: r for r in (engine.results_queue.get(timeout=60) for _ in ROWS)}
    for row in ROWS:
        result = results[row["index"]]
        assert len(result.responses) == len(result.reward_scores) == 3 and result.reward_metrics == {"seen": 3}
        assert [len(m) for m in result.masks] == [len(r) for r in result.responses]
        assert result.token_statistics.num_response_tokens == sum(map(len, result.responses))
        assert result.model_step == version(client)[1]
        prompts = [tokenizer.encode(row["prompt"]).ids] * 3
        assert_scores_equal(client, prompts, result.responses, result.logprobs, 0.9)

    override = request_of(tokenizer, ROWS[1], ground_truth="nothing says this")
    engine.prompt_queue.put(override)
    assert engine.results_queue.get(timeout=60).reward_scores == [0.0, 0.0]
    engine.engine.check_background_threads()


def test_open_instruct_pauses_and_reports_failures(engine, tokenizer):
    engine.manager.stop = True
    time.sleep(0.6)  # what it had begun to wait for
    engine.prompt_queue.put(request_of(tokenizer, ROWS[0]))
    with pytest.raises(queue.Empty):
        engine.results_queue.get(timeout=1)
    engine.manager.stop = False
    engine.results_queue.get(timeout=60)
    engine.prompt_queue.put(request_of(tokenizer, ROWS[0], env_config=types.SimpleNamespace(env_configs={"search": 1})))
    engine.prompt_queue.put(request_of(tokenizer, ROWS[0]))
    engine.results_queue.get(timeout=60)
    with pytest.raises(ValueError, match="environments are not supported"):
        engine.engine.check_background_threads()


def test_open_instruct_engines_and_weights(
    open_instruct, fp32_worker, client, tiny_model, model, tokenizer, monkeypatch
):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Text(tokenizer))
    queues = {name: queue.Queue() for name in ("prompt_queue", "results_queue", "eval_results_queue")}
    create = functools.partial(open_instruct.create_engines, workers=[fp32_worker.data])
    vllm_alone = (str(tiny_model), None, 1, False, 4096, 0.9, False)
    with pytest.raises(ValueError, match="pools: .'search'"):
        create(1, 1, False, str(tiny_model), *vllm_alone, pools={"search": None}, **queues)
    (engine,) = create(1, 1, False, str(tiny_model), *vllm_alone, pg=None, tool_parser_type="legacy", **queues)
    epoch = version(client)[0] + 1
    publisher = open_instruct.make_publisher(model, [fp32_worker.control])
    try:
        assert open_instruct.broadcast_weights(model, publisher, [engine], 6, epoch=epoch) == [None]
        assert open_instruct.broadcast_weights(model, None, [engine], 6) == []  # another rank
        queues["prompt_queue"].put(request_of(tokenizer, ROWS[0]))
        result = queues["results_queue"].get(timeout=60)
        assert version(client) == (epoch, 6) and result.model_step == 6 and result.reward_scores is None
        for nothing in (engine.sleep, engine.wake_up, engine.reset_prefix_cache):
            assert nothing.remote() is None
    finally:
        publisher.close()
        engine.close.remote()
