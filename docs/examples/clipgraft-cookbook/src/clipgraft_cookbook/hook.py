"""How many images per second each stage took in, written beside its metrics."""

import time

from clipgraft import files
from clipgraft.spec import runhook


class Throughput:
    """Any subset of the lifecycle's methods, each with any subset of its arguments."""

    observer = True  # a failure in here is reported once and does not end the run

    @runhook
    def on_stage_start(self, stage):
        self.images, self.began = 0, time.perf_counter()

    @runhook
    def after_step(self, output):
        self.images += output.size

    @runhook
    def on_stage_end(self, run, stage):
        if run.is_main and self.images:
            rate = self.images / (time.perf_counter() - self.began)
            files.write_json(run.stage_folder(stage.name) / "throughput.json", {"images_per_second": rate})
