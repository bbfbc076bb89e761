/** The fields of the sampling settings: steps, sampler and guidance. */

import { element } from "./words.js";

const SAMPLERS = {
  euler: "Euler",
  heun: "Heun (two evaluations a step)",
  dpmpp_2m: "DPM-Solver++ 2M",
  flow_map: "Flow map",
};

export class SamplingFields {
  /** @param {HTMLElement} place  @param {Info} info  of the network  @param {string} form  id of their form */
  constructor(place, info, form) {
    const { steps, sampler, guidance } = info.settings;
    this.steps = element("input", {
      type: "number",
      name: "steps",
      form,
      min: steps.least,
      max: steps.most,
      step: 1,
      required: true,
    });
    this.guidance = element("input", {
      type: "number",
      name: "guidance",
      form,
      min: guidance.least,
      max: guidance.most,
      step: "any",
      required: true,
    });
    this.sampler = element("select", { name: "sampler", form });
    for (const choice of sampler.choices)
      this.sampler.append(element("option", { value: choice }, SAMPLERS[choice] ?? choice));
    place.append(
      field("Steps", this.steps, "More steps take longer."),
      field("Guidance", this.guidance, "1 is off; more follows the class more closely, with less variety."),
      field("Sampler", this.sampler),
    );
    this.value = Object.fromEntries(["steps", "sampler", "guidance"].map((key) => [key, info.settings[key].default]));
  }

  get value() {
    return { steps: this.steps.valueAsNumber, sampler: this.sampler.value, guidance: this.guidance.valueAsNumber };
  }

  set value({ steps, sampler, guidance }) {
    this.steps.value = steps;
    this.sampler.value = sampler;
    this.guidance.value = guidance;
  }
}

function field(text, input, hint) {
  return element(
    "label",
    { class: "field" },
    element("span", {}, text),
    input,
    ...(hint ? [element("small", {}, hint)] : []),
  );
}
