// What this browser remembers of the page: the settings of the shown images in the address, and controls, images and
// photos in its own storage, so that a reload, Back, or a lost connection loses nothing.
(() => {
  const KEY = "dsd-page"; // in sessionStorage: for this tab of the browser
  const PLACES = ["edit-board", "inpaint-board", "walk-strip", "walk-animation", "way"]; // of images, beside #board
  const PHOTOS = ["photo", "from-photo", "to-photo", "inside-photo"];
  const TABS = {generate: "Generate", photo: "Your photo", walk: "Walk", inside: "Look inside", training: "Training"};
  const LINK = ["class", "n", "seed", "index", "steps", "sampler", "guidance", "guidance_start", "guidance_stop", "model"];

  const byId = (id) => document.getElementById(id);
  const parse = (text) => { try { return JSON.parse(text) ?? {}; } catch { return {}; } };

  let memory = parse(dsd.stored("sessionStorage", KEY));
  let ready = false; // once the page is as it was; until then its defaults must not replace what is remembered

  function save() {
    if (!ready) return;
    memory.search = settings(location.search);
    memory.classes = parse(document.querySelector("#chosen [data-chosen]")?.dataset.chosen ?? "null");
    memory.images = Object.fromEntries(PLACES.map((place) =>
      [place, [...document.querySelectorAll(`#${place} [data-image]`)].map((one) => one.dataset.image)]));
    dsd.store("sessionStorage", KEY, JSON.stringify(memory));
  }

  // The part of an address that says which images are shown, in a fixed order.
  function settings(search) {
    const given = new URLSearchParams(search);
    return new URLSearchParams(LINK.filter((name) => given.has(name)).map((name) => [name, given.get(name)])).toString();
  }

  function tabOf(search) {
    const name = new URLSearchParams(search).get("tab");
    return tabButton(name) ? name : "generate"; // of a link there may be no such tab, or none with this model
  }
  function address(link, tab) {
    const found = new URLSearchParams(link);
    if (tab !== "generate") found.set("tab", tab);
    const query = found.toString().replaceAll("%2C", ",");
    return location.pathname + (query ? `?${query}` : "");
  }

  // Tabs.
  const tabButton = (name) => [...document.querySelectorAll("#tabs > .tab-wrapper [role=tab], #tabs [role=tab]")]
    .find((one) => one.textContent.trim() === TABS[name]);
  function currentTab() {
    return Object.keys(TABS).find((name) => tabButton(name)?.ariaSelected === "true") ?? "generate";
  }
  function select(name) {
    const button = tabButton(name);
    if (button && button.ariaSelected !== "true") button.click();
  }

  // The address follows the images, when they change, and the tab; each is an entry of the history. The images of a link
  // have the entry with which it was opened.
  let drawn = "", linked = false;
  function follow() {
    const found = settings(document.querySelector("#board .board")?.dataset.link ?? "");
    const changed = found && found !== drawn;
    if (found) drawn = found;
    if (!ready) return;
    const link = changed ? found : settings(location.search), tab = currentTab();
    if (linked && drawn) {
      history.replaceState(null, "", address(drawn, tab));
      linked = false;
    } else if (link !== settings(location.search) || tab !== tabOf(location.search)) history.pushState(null, "", address(link, tab));
    save();
  }

  addEventListener("popstate", () => {
    select(tabOf(location.search));
    const shown = settings(document.querySelector("#board .board")?.dataset.link ?? "");
    if (shown) drawn = shown; // images that came just before get no entry
    if (settings(location.search) !== shown) open();
  });

  const open = () => byId("refresh")?.click();

  // The message of this script to the server when the page is opened, and when its model changes; see ui/opening.py.
  let opening = 0;
  let settled = false; // once Gradio has set all controls to an answer
  function kept(opens) {
    const same = memory.search === settings(location.search); // otherwise the address takes precedence
    const own = (name) => !/^generate\.(n|index|seed|keep|num_steps|sampler|guidance)/.test(name);
    const values = Object.entries(memory.values ?? {}).filter(([name]) => same || own(name));
    if (opens) {
      ready = settled = false;
      setTimeout(restored, 0, String(++opening), currentTab());
    }
    return {
      opening: String(opening), search: location.search, values: Object.fromEntries(values), images: memory.images ?? {},
      classes: same ? memory.classes ?? [] : [], classes_of: document.querySelector("#told [data-classes]")?.dataset.classes ?? "",
    };
  }

  // Once the answer has arrived, which has our number, what is shown is remembered again.
  async function restored(number, before) {
    while (!settled || !document.querySelector(`#told [data-opening="${number}"]`)) {
      if (number !== String(opening)) return;
      await pause(50);
    }
    if (currentTab() === before) select(tabOf(location.search)); // otherwise the visitor has chosen one meanwhile
    if (number === "1") {
      await restorePhotos();
      linked = new URLSearchParams(location.search).has("seed");
    }
    ready = true;
    follow();
  }
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));

  function remember(names, values) {
    if (!ready) return;
    memory.values = Object.fromEntries(names.map((name, i) => [name, values[i]]));
    save();
  }

  // Photos: kept in IndexedDB, and uploaded again after a reload.
  const tab = memory.tab ??= Math.random().toString(36).slice(2);
  function store(mode, work) {
    return new Promise((done) => {
      const opening = indexedDB.open("dsd-photos", 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore("photos");
      opening.onerror = () => done(undefined);
      opening.onsuccess = () => {
        const request = work(opening.result.transaction("photos", mode).objectStore("photos"));
        request.onsuccess = () => done(request.result);
        request.onerror = () => done(undefined);
      };
    });
  }
  const DAY = 86_400_000;
  const sources = {}; // element -> address of the image that is kept of it
  async function keepPhotos() {
    if (!ready) return;
    for (const id of PHOTOS) {
      const image = document.querySelector(`#${id} img`);
      const source = image?.src.includes("/gradio_api/file=") ? image.src : "";
      if (sources[id] === source || (!image && byId(id) === null)) continue;
      const before = sources[id];
      sources[id] = source;
      try {
        if (!source) { if (before) await store("readwrite", (all) => all.delete(`${tab} ${id}`)); continue; }
        const answer = await fetch(source);
        if (!answer.ok) continue;
        const name = decodeURIComponent(source.split("/").pop());
        const blob = await answer.blob();
        await store("readwrite", (all) => all.put({blob, name, at: Date.now()}, `${tab} ${id}`));
      } catch { /* without storage nothing is kept */ }
    }
  }
  async function restorePhotos() {
    for (const id of PHOTOS) {
      const input = () => document.querySelector(`#${id} input[type=file]`);
      if (document.querySelector(`#${id} img`)) continue;
      let found;
      try { found = await store("readonly", (all) => all.get(`${tab} ${id}`)); } catch { return; }
      if (!found) continue;
      waiting.set(id, found);
    }
    givePhotos();
    clean();
  }
  // A tab's input is there only once the tab has been shown.
  const waiting = new Map();
  function givePhotos() {
    for (const [id, found] of waiting) {
      const input = document.querySelector(`#${id} input[type=file]`);
      if (!input) continue;
      waiting.delete(id);
      const files = new DataTransfer();
      files.items.add(new File([found.blob], found.name, {type: found.blob.type}));
      input.files = files.files;
      input.dispatchEvent(new Event("change", {bubbles: true}));
    }
  }
  async function clean() {
    const keys = await store("readonly", (all) => all.getAllKeys()) ?? [];
    for (const key of keys) {
      const found = await store("readonly", (all) => all.get(key));
      if (found && Date.now() - found.at > DAY) await store("readwrite", (all) => all.delete(key));
    }
  }

  // Images are followed soon after a change, and before the next click, so that the ones it replaces have their entry too.
  // Photos are kept once the page stands still: while Gradio mounts a control, its image is missing for a moment.
  let changed = 0, moving = 0;
  function look() {
    clearTimeout(changed);
    changed = 0;
    follow();
    givePhotos();
  }
  new MutationObserver(() => {
    changed ||= setTimeout(look, 150);
    clearTimeout(moving);
    moving = setTimeout(keepPhotos, 150);
  }).observe(document.documentElement, {childList: true, subtree: true, attributes: true, attributeFilter: ["aria-selected", "data-link", "data-image", "data-chosen", "src"]});
  addEventListener("click", (event) => { if (changed && event.isTrusted) look(); }, true);
  addEventListener("pagehide", save);

  Object.assign(window.dsd, {kept, remember, open, ready: () => ready, settle: () => { settled = true; }, address: (link) => new URL(address(settings(link), "generate"), location.href).href});
})();
