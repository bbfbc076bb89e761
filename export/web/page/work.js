/** The work that a form starts: new work stops the work before it, so there is only one on the whole page. */

import { announce, button, clearNotice, isStop, notify, sentence } from "./words.js";

let latest = null; // the run that was started last, by any form

export class Work {
  /** @param {HTMLFormElement} form  with a submit button and a Stop button  @param {Network} network */
  constructor(form, network) {
    this.network = network;
    this.submit = form.querySelector("button.primary");
    this.stop = form.querySelector("button.stop");
    this.stop.onclick = () => network.cancel();
    this.submit.disabled = false;
  }

  /**
   * Carry out `task`, which calls the network. An error is shown in words, with a button that tries again.
   * @returns {Promise<"done"|"stopped"|"failed">}
   */
  async run(task) {
    this.network.cancel();
    const run = (this.current = latest = {});
    clearNotice();
    this.#show(true);
    try {
      await task(() => latest === run);
      return "done";
    } catch (error) {
      if (isStop(error)) {
        if (latest === run) announce("Stopped.");
        return "stopped";
      }
      notify(sentence(error), { actions: [button("Try again", () => this.run(task))] });
      return "failed";
    } finally {
      if (this.current === run) this.#show(false);
    }
  }

  #show(isBusy) {
    if (!isBusy && document.activeElement === this.stop) this.submit.focus();
    this.stop.hidden = !isBusy;
  }
}
