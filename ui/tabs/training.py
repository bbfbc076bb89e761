"""The Training tab: the same seeds drawn by each checkpoint of the run that the server follows."""

from dataclasses import dataclass

import gradio as gr

from ui import html
from ui.controls import Updates
from ui.server_info import ServerInfo


@dataclass(frozen=True)
class TrainingTab:
    tab: gr.Tab
    strip: gr.HTML

    def fitted(self, info: ServerInfo) -> Updates:
        """The tab is there only while the server follows a run."""
        shown = html.training(info.run) if info.run else ""
        return {self.tab: gr.update(visible=info.run is not None), self.strip: shown}


def build(tab: gr.Tab) -> TrainingTab:
    return TrainingTab(tab, html.shown("", elem_id="training"))
