/** The tabs of the page: arrow keys, Home and End move between them. */

export class Tabs {
  /** @param {HTMLElement} list  of tabs, which name panels  @param {function(string): void} onChoose  id of a panel */
  constructor(list, onChoose) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    for (const tab of this.tabs) {
      tab.disabled = false;
      tab.onclick = () => onChoose(tab.getAttribute("aria-controls"));
    }
    list.onkeydown = (event) => {
      const at = this.tabs.indexOf(document.activeElement);
      const last = this.tabs.length - 1;
      const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at === 0 ? last : at - 1, Home: 0, End: last }[
        event.key
      ];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      this.tabs[to].focus();
      this.tabs[to].click();
    };
  }

  /** Show the panel with this id. */
  show(id) {
    for (const tab of this.tabs) {
      const panel = tab.getAttribute("aria-controls");
      const isChosen = panel === id;
      tab.setAttribute("aria-selected", isChosen);
      tab.tabIndex = isChosen ? 0 : -1;
      document.getElementById(panel).hidden = !isChosen;
    }
  }
}
