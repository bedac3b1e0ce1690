"""Holds the adapter to what the model knew: on samples of regularization sets its target is the base's prediction."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice

from torch import Tensor

from models.base import MicroBatch
from utils.data.plan import Item
from utils.train.engine import ReelEngine

Held = Mapping[int, Sequence[int]]  # micro-batch of a step, of one data rank -> its samples that are held, by slot


def held_samples(micro_batches: Sequence[Sequence[Item]], is_held: Callable[[int], bool]) -> Held:
    """Which samples of the micro-batches of one data rank are held; `is_held` takes the index of an entry."""
    slots = ([slot for slot, item in enumerate(items) if is_held(item.entry)] for items in micro_batches)
    return {index: found for index, found in enumerate(slots) if found}


def toward_base(engine: ReelEngine, batches: Iterator[MicroBatch] | None, held: Held) -> Iterator[MicroBatch] | None:
    """The micro-batches of one step with the targets of held samples replaced by what the model without its adapter
    predicts for the same noisy input: prior preservation as SimpleTuner has it (`is_regularisation_data`). The adapter
    starts as no change, so their loss starts at 0.

    One pass forward through the pipeline, of the micro-batches that hold such samples and of no others. Every rank of a
    step that has any calls this, since passes begin together; all know the plan, so nothing is sent to agree on it.

    Args:
        batches: of the step, on the first and the last stage; they are read as far as the last held sample.
        held: of this data rank, empty where only other data ranks have any.
    """
    read: list[MicroBatch] = []
    chosen = None if batches is None else _chosen(batches, held, read)
    predictions = engine.predict_base(chosen, len(held))
    if batches is None:
        return None
    for index, prediction in zip(held, predictions, strict=engine.is_last_stage()):
        read[index] = _with_target(read[index], held[index], prediction)
    return chain(read, batches)


def _chosen(batches: Iterator[MicroBatch], held: Held, read: list[MicroBatch]) -> Iterator[MicroBatch]:
    for index, batch in enumerate(islice(batches, max(held, default=-1) + 1)):
        read.append(batch)
        if index in held:
            yield batch


def _with_target(batch: MicroBatch, slots: Sequence[int], prediction: Tensor) -> MicroBatch:
    target, *rest = batch.target
    target = target.to(prediction.device, copy=True)
    target[slots] = prediction[slots].to(target.dtype)
    return batch._replace(target=(target, *rest))
