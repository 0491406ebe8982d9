import pytest
import torch

from minilib import memory
from minilib.attention import get_attention
from minilib.memory import peak_bytes

KB = 4 * 250  # bytes of 250 float32


def vector(n=250):
    return torch.zeros(n)


def one_after_the_other():
    for _ in range(5):
        vector()


def all_at_once():
    return [vector() for _ in range(5)]


def the_middle_is_the_worst():
    large = vector(2500)
    small = vector()
    del large
    return small, vector()


def views():
    x = vector()
    return [x.view(5, 50)[i] for i in range(5)]


@pytest.mark.parametrize(
    "function, kilobytes",
    [
        (lambda: None, 0),
        (vector, 1),
        (one_after_the_other, 1),
        (all_at_once, 5),
        (the_middle_is_the_worst, 11),
        (views, 1),
    ],
)
def test_the_peak_is_counted_by_hand(function, kilobytes):
    assert peak_bytes(function) == kilobytes * KB


def test_what_was_there_before_does_not_count():
    kept = vector(10_000)
    assert peak_bytes(kept.neg) == kept.nbytes


def test_what_was_there_before_and_is_let_go_of_is_not_credited():
    held = [vector(1000)]

    def swap():
        held.clear()
        held.append(vector(500))

    assert peak_bytes(swap) == 2 * KB


def test_a_first_call_that_keeps_something_is_the_warm_up():
    kept = []

    def once():
        kept.append(vector()) if not kept else None

    assert peak_bytes(once) == 0 and len(kept) == 1


def test_a_function_that_keeps_more_with_each_call_counts():
    kept = []
    assert peak_bytes(lambda: kept.append(vector())) == KB and len(kept) == 2


def test_naive_attention_holds_the_weights_twice_and_fused_attention_never():
    b, h, n, d = 2, 3, 256, 8
    q = torch.randn(b, h, n, d)
    weights, values = 4 * b * h * n * n, q.nbytes
    naive = peak_bytes(lambda: get_attention("naive")(q, q, q))
    fused = peak_bytes(lambda: get_attention("full")(q, q, q))
    assert 2 * weights <= naive <= 2 * weights + 3 * values
    assert values <= fused < weights / 2


def test_gradients_keep_what_the_backward_pass_needs():
    x = torch.randn(64, 64, requires_grad=True)
    with torch.no_grad():
        without = peak_bytes(lambda: x.sin().cos().exp())
    assert without == 2 * x.nbytes  # the result of one step and of the next
    assert peak_bytes(lambda: x.sin().cos().exp()) == 3 * x.nbytes


def test_errors_of_the_function_pass_through():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)


def test_nothing_is_printed(capfd):
    peak_bytes(vector)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_other_devices_are_refused_by_name(device):
    with pytest.raises(ValueError, match=device):
        peak_bytes(vector, device=device)


def test_events_count_in_the_order_of_their_index_and_of_the_cpu_alone():
    def event(index, change, device=0):
        return {"name": "[memory]", "args": {"Ev Idx": index, "Bytes": change, "Device Type": device}}

    trace = [event(2, -5), event(1, 5), event(3, 4), event(0, 1), event(4, 100, device=1), {"name": "x"}]
    assert memory._highest(trace) == 6


def test_on_a_gpu_the_allocator_is_asked(monkeypatch):
    calls = []
    cuda = memory.torch.cuda
    monkeypatch.setattr(cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 30)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: 100)
    assert peak_bytes(lambda: calls.append("run"), device="cuda") == 70
    assert calls == ["run", "wait", "reset", "run"]
