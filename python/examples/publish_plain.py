"""New weights from one process. Usage: publish_plain.py --model DIR --step N CONTROL_HOST:PORT..."""

import argparse

from lockstep import WeightPublisher


def publish(model, workers, step):
    """model: any torch module with the checkpoint's names."""
    with WeightPublisher(workers, manifest_from=model) as publisher:
        return publisher.publish((0, step), model.state_dict().items(), policy="recompute")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("workers", nargs="+")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    print(publish(model, arguments.workers, arguments.step))


if __name__ == "__main__":
    main()
