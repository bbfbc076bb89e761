"""An engine process that loads its model and then behaves as its environment says, for tests of the server's side."""

import os
import signal
import time

from dsd_serve import engine_process
from dsd_serve.backends import row_budget
from dsd_serve.backends.process import engine_messages as messages
from dsd_serve.backends.row_budget import RowBudget
from dsd_serve.engines.onnx_engine import OnnxEngine

FAULT = "DSD_TEST_FAULT"  # a fault, and the file that must exist for it to happen, apart by a colon


def armed(fault: str) -> bool:
    name, _, file = os.environ.get(FAULT, "").partition(":")
    return name == fault and os.path.exists(file)


class FaultyProcess(engine_process.EngineProcess):
    def submit(self, message, inputs):
        if armed("garbage"):
            self.mailbox.socket.send_multipart([b"\xff garbage", b"\0" * 100])
        elif armed("wrong type"):
            self.mailbox.socket.send(messages.encoder.encode([["Finished", "seven", 0.0, ["uint8", [1]]]]))
        elif armed("wrong shape"):
            self.mailbox.put(messages.Finished(message.number, 1.0, messages.ArrayHead("uint8", (2,))), [ARRAY])
        elif armed("unknown tasks"):
            for number in (-1, 10**12):
                self.mailbox.put(messages.Finished(number, 1.0, messages.ArrayHead("uint8", (2,))), [ARRAY])
                self.mailbox.put(messages.Started(number, 1.0))
            super().submit(message, inputs)
        elif armed("exit"):
            print("a library says good-bye", flush=True)
            os._exit(7)
        elif armed("segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        elif armed("stuck"):
            time.sleep(1000)
        else:
            super().submit(message, inputs)


def measure(engine):
    """A measurement on a machine so busy that more rows seemed to take much longer."""
    measured, times = measured_well(engine)
    return RowBudget(1, dict.fromkeys(measured.gains, 0.2)), times


measured_well = row_budget.measure_budget
ran = OnnxEngine.run


def run(self, rows):
    if armed("engine fails"):
        raise RuntimeError("the device fell off the bus")
    return ran(self, rows)


if __name__ == "__main__":
    import numpy as np

    ARRAY = np.zeros(2, np.uint8)
    OnnxEngine.run = run
    engine_process.EngineProcess = FaultyProcess
    if armed("busy start"):
        row_budget.measure_budget = measure
    engine_process.main()
