"""Rollouts for TRL's GRPOTrainer from Lockstep workers: a `rollout_func`.

    trainer = GRPOTrainer(
        model=..., reward_funcs=..., train_dataset=..., args=GRPOConfig(use_vllm=False, ...),
        rollout_func=LockstepRollout(["host:50051"], ["host:50052"]),
    )

Written against TRL 1.10.0.dev0 (commit f2cd577; GRPOTrainer calls `rollout_func` experimental). The project's tests run
it with a stand-in for the trainer and a real worker; it has not run under TRL. What to know:

- GRPOTrainer calls rollout_func(prompts, trainer) with this process's prompts, each already num_generations times, one
  behind the other, and wants one completion for every entry. Equal neighbours share their prompt's prefill here.
- The returned log-probabilities reach TRL's off-policy mask, but its truncated importance sampling only with
  use_vllm=True, which starts vLLM. Without it TRL takes the ratio to the rollout for 1: true as far as worker and
  trainer agree (`lockstep parity`).
- TRL pads prompts on the left, which shifts a recurrent layer's chunks: with GDN layers its log-probabilities equal the
  worker's in bits only where a batch's prompts are equally long.
- One process or DDP: process 0 publishes. FSDP, ZeRO-3 and PEFT are refused (publish_fsdp2.py and publish_zero3.py
  show the gathering).
"""

import itertools

from lockstep import RolloutClient, SamplingParams, WeightPublisher


class LockstepRollout:
    """workers, control: HOST:PORT of the workers' data and control planes.

    seed: of the draws; None: other ones in every run. timeout_s: of one call's generation.
    """

    def __init__(self, workers, control, *, seed=None, timeout_s=600.0):
        self._client, self._control = RolloutClient(workers), control
        self._seed, self._timeout_s = seed, timeout_s
        self._publisher = self._epoch = self._published = None
        self._calls = 0

    def close(self):
        self._client.close()
        if self._publisher is not None:
            self._publisher.close()

    def __call__(self, prompts, trainer):
        self._publish(trainer)
        ids = _encode(prompts, trainer)
        groups = [(key, len(list(same))) for key, same in itertools.groupby(map(tuple, ids))]
        n = groups[0][1]
        if any(count != n for _, count in groups):  # a rest of a group, or two groups of one prompt
            groups, n = [(key, 1) for key in map(tuple, ids)], 1
        rollouts = self._client.generate(
            [key for key, _ in groups], self._sampling(trainer), n=n, timeout=self._timeout_s
        )
        aborted = [sample.message or sample.reason for sample in rollouts if sample.finish_reason == "aborted"]
        if aborted:
            raise RuntimeError(f"{len(aborted)} of {len(rollouts)} samples were aborted: {aborted[0]}")
        return {
            "prompt_ids": [list(prompt) for prompt in ids],
            "completion_ids": [tokens.tolist() for tokens in rollouts.tokens],
            "logprobs": [
                values.tolist() for values in rollouts.logprobs
            ],  # of the temperature: what TRL's loss computes
        }

    def _sampling(self, trainer):
        seed = None
        if self._seed is not None:
            seed = hash((self._seed, trainer.accelerator.process_index, self._calls)) % 2**64
            self._calls += 1
        return SamplingParams(
            max_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or 0,
            min_p=trainer.min_p or 0.0,
            repetition_penalty=trainer.repetition_penalty,
            seed=seed,
        )

    def _publish(self, trainer):
        """The weights of this step, once; accumulation steps and evaluation find them there."""
        step = trainer.state.global_step
        if step == self._published:
            return
        if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
            raise ValueError(
                "LockstepRollout publishes whole parameters: want one process or DDP, not FSDP or DeepSpeed"
            )
        if trainer.accelerator.is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            if hasattr(model, "peft_config"):
                raise ValueError("LockstepRollout: a PEFT model, want one with whole weights")
            if self._publisher is None:
                self._publisher = WeightPublisher(self._control, manifest_from=model)
                versions = [info.weight_version.epoch for info in self._client.info().values()]
                self._epoch = max(versions) + 1  # a resumed run counts its steps anew
            self._publisher.publish((self._epoch, step), model.state_dict().items())
        trainer.accelerator.wait_for_everyone()  # no process asks for rollouts before the weights serve
        self._published = step


def _encode(prompts, trainer):
    """Token ids of each prompt, as GRPOTrainer makes them: text, or messages under the chat template."""
    if isinstance(prompts[0], str):
        return trainer.processing_class(text=prompts)["input_ids"]
    return trainer.processing_class.apply_chat_template(
        conversation=prompts,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **trainer.chat_template_kwargs,
    )["input_ids"]
