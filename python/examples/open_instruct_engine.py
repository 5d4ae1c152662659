"""Lockstep workers behind the engine interface of open-instruct's GRPO (open_instruct/vllm_utils.py: LLMRayActor).

open-instruct has no place to plug an engine in. Written against its commit e6c3044, where a fork would change three calls
(grpo.py, grpo_fast.py):

    vllm_utils.create_vllm_engines(...)          create_engines(..., workers=["host:50051"])
    setup_model_update_group's body              self.vllm_engines = vllm_engines; on rank 0
                                                 self.publisher = make_publisher(self.model.module, ["host:50052"])
    vllm_utils.broadcast_weights_to_vllm(...)    broadcast_weights(self.model.module, self.publisher, self.vllm_engines,
                                                                   model_step)

The project's tests run it with stand-ins for open-instruct and Ray, and a real worker; it has not run under
open-instruct. What to know:

- Text alone: tools and environments (`pools`) are refused.
- `vllm_num_engines`: 1 is enough. An engine here is a client: it spreads requests over all `workers`.
- Log-probabilities are log_softmax(logits / temperature), which open-instruct's loss computes; vLLM is asked there for
  those of the filtered distribution, which is the same for top_p = 1.
- `model_step` of a result is the oldest version that computed one of its tokens, by the worker's own word.
- Whether samples in flight go on under new weights is publish()'s `policy` (docs/weights.md), not inflight_updates.
"""

import asyncio
import concurrent.futures
import queue
import threading
import time

from lockstep import RolloutClient, SamplingParams, WeightPublisher

POLL_S = 0.2


class LockstepEngine:
    """Takes PromptRequests from a queue, puts GenerationResults into another, until closed.

    workers: HOST:PORT of data planes. tokenizer: a Hugging Face one, for the rewards' text. concurrency: prompts at one
    time; each is generation_config.n samples. The other parameters are LLMRayActor's.
    """

    def __init__(
        self,
        workers,
        tokenizer,
        *,
        prompt_queue,
        results_queue,
        eval_results_queue,
        actor_manager=None,
        reward_config=None,
        train_dataset=None,
        eval_dataset=None,
        pools=None,
        concurrency=64,
        timeout_s=3600.0,
    ):
        if pools:
            raise ValueError(f"pools: {sorted(pools)}: tools and environments are not supported")
        self._client, self._tokenizer = RolloutClient(workers), tokenizer
        self._prompts, self._results, self._eval_results = prompt_queue, results_queue, eval_results_queue
        self._manager, self._timeout_s, self._concurrency = actor_manager, timeout_s, concurrency
        self._datasets = {False: train_dataset, True: eval_dataset}
        self._rows = {
            is_eval: {} if data is None else {int(data[i]["index"]): i for i in range(len(data))}
            for is_eval, data in self._datasets.items()
        }
        self._reward = reward_config.build() if reward_config is not None else None
        self._loop = asyncio.new_event_loop()  # one for all rewards: verifiers may keep connections
        threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()
        self._executor = concurrent.futures.ThreadPoolExecutor(concurrency + 1)
        self._free = threading.Semaphore(concurrency)
        self._closed = threading.Event()
        self._taker, self._running = self._executor.submit(self._take), []

    # What open-instruct calls

    def ready(self):
        self._client.info()
        return True

    def get_kv_cache_info(self):
        """Sequences at one time, for open-instruct's warning: the state slots of all workers."""
        return sum(load.state_slots_total for load in self._client.load().values()) or self._concurrency

    def check_background_threads(self):
        """Raises what a request has failed with."""
        for future in [self._taker, *self._running]:
            if future.done():
                future.result()

    def sleep(self):
        """Nothing: publishing does not need the workers to rest."""

    wake_up = reset_prefix_cache = sleep

    def set_model_step(self, model_step):
        """Nothing: each result carries the version that computed it."""

    def close(self):
        self._closed.set()
        self._executor.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._client.close()

    # How requests become results

    def _take(self):
        while not self._closed.is_set():
            if not self._free.acquire(timeout=POLL_S):
                continue
            request = None
            try:
                if not self._paused():
                    request = self._prompts.get(timeout=POLL_S)
            except queue.Empty:
                pass
            if request is None:
                self._free.release()
                continue
            kept = [f for f in self._running if not f.done() or f.exception() is not None]
            self._running = [*kept, self._executor.submit(self._answer, request)]

    def _paused(self):
        """open-instruct's actor manager stops the flow of prompts while weights are published."""
        if self._manager is None:
            return False
        import ray

        paused = ray.get(self._manager.should_stop.remote())
        if paused:
            time.sleep(POLL_S)
        return paused

    def _answer(self, request):
        try:
            result = self._generate(request)
            if self._reward is not None:
                result.reward_scores, result.reward_metrics = self._rewards(request, result)
            (self._eval_results if request.is_eval else self._results).put(result)
        finally:
            self._free.release()

    def _generate(self, request):
        from open_instruct import data_types

        config, begin = request.generation_config, time.perf_counter()
        if request.env_config is not None and request.env_config.env_configs:
            raise ValueError(f"env_config: {sorted(request.env_config.env_configs)}: environments are not supported")
        sampling = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            clamp=True,  # to the context, as vLLM's client there does
            min_tokens=config.min_tokens,
            stop_strings=config.stop or (),
            seed=config.seed,
        )
        rollouts = self._client.generate([request.prompt], sampling, n=config.n, timeout=self._timeout_s)
        for sample in rollouts:
            if sample.finish_reason == "aborted":
                raise RuntimeError(f"{request.prompt_id}: aborted: {sample.message or sample.reason}")
        n = len(rollouts)
        steps = [s.weights.step for spans in rollouts.version_spans for s in spans if s.weights is not None]
        return data_types.GenerationResult(
            responses=[tokens.tolist() for tokens in rollouts.tokens],
            finish_reasons=rollouts.finish_reasons,  # "stop" or "length", as vLLM's
            masks=[[1] * len(sample) for sample in rollouts],
            request_info=data_types.RequestInfo(
                num_calls=[0] * n,
                timeouts=[False] * n,
                tool_errors=[""] * n,
                tool_outputs=[""] * n,
                tool_runtimes=[0.0] * n,
                tool_calleds=[False] * n,
                tool_call_stats=[[] for _ in range(n)],
                rollout_states=[{} for _ in range(n)],
            ),
            index=request.index,
            prompt_id=request.prompt_id,
            token_statistics=data_types.TokenStatistics(
                num_prompt_tokens=len(request.prompt),
                num_response_tokens=sum(len(sample) for sample in rollouts),
                generation_time=time.perf_counter() - begin,
            ),
            start_time=begin,
            logprobs=[values.tolist() for values in rollouts.logprobs],
            model_step=min(steps),
        )

    def _rewards(self, request, result):
        row = dict(self._datasets[request.is_eval][self._rows[request.is_eval][request.index]])
        if request.ground_truth is not None and not request.is_eval:
            row["ground_truth"] = request.ground_truth
        n = len(result.responses)
        text = self._tokenizer.batch_decode(result.responses, skip_special_tokens=True)
        truths, sources, queries = [row["ground_truth"]] * n, [row["dataset"]] * n, [row["prompt"]] * n
        reward = self._reward(
            result.responses, text, truths, sources, result.finish_reasons, result.request_info, queries
        )
        return asyncio.run_coroutine_threadsafe(reward, self._loop).result()


def create_engines(num_engines, tensor_parallel_size, enforce_eager, tokenizer_name_or_path, *vllm, workers, **options):
    """As create_vllm_engines, with `workers`; what concerns vLLM alone is not looked at."""
    import ray
    import transformers

    names = ("prompt_queue", "results_queue", "eval_results_queue", "actor_manager", "reward_config")
    names += ("train_dataset", "eval_dataset", "pools")
    chosen = {name: options[name] for name in names if name in options}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_name_or_path)
    actor = ray.remote(LockstepEngine).options(num_cpus=1)
    engines = [actor.remote(workers, tokenizer, **chosen) for _ in range(num_engines)]
    ray.get([engine.ready.remote() for engine in engines])
    return engines


def make_publisher(module, control, **options):
    """On rank 0. control: HOST:PORT of control planes. module: whole, or under ZeRO-3."""
    from publish_zero3 import manifest

    return WeightPublisher(control, manifest_from=manifest(module), **options)


def broadcast_weights(module, publisher, engines, model_step, *, epoch=0, policy="recompute"):
    """As broadcast_weights_to_vllm: on every rank, as gathering is a collective; rank 0 (the one with a publisher) sends.

    epoch: one more for a run that counts its steps anew, as versions go forward only. Returns nothing to wait for: when
    it returns on rank 0, the weights serve.
    """
    from publish_zero3 import gathered

    if publisher is None:
        for _ in gathered(module):
            pass
        return []
    publisher.publish((epoch, model_step), gathered(module), policy=policy)
    return [engine.set_model_step.remote(model_step) for engine in engines]
