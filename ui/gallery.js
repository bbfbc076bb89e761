// The gallery: a strip of the images that this browser has drawn, with stars, a large view with arrows and a comparison,
// links to copy, and all images of a board in one file. It lives in the browser; an image is drawn again from its link.
(() => {
  const KEY = "dsd-history"; // in localStorage
  const MOST = 120; // images of the strip; starred ones are dropped last
  const byId = (id) => document.getElementById(id);

  // The images in a stored text; what is not as `described` makes it is left out.
  function parse(text) {
    let found;
    try { found = JSON.parse(text); } catch { /* damaged */ }
    return (Array.isArray(found) ? found : []).filter((one) => /^[0-9a-f]{32}$/.test(one?.id) &&
      [one.query, one.title, one.file].every((value) => typeof value === "string"));
  }

  function make(tag, settings = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(settings)) {
      if (name in element && name !== "list") element[name] = value; else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  const described = (one) => ({
    id: one.dataset.image, query: one.dataset.query, title: one.dataset.title, file: one.dataset.file,
  });
  const url = (image) => `studio/image/${image.id}.png${image.query ? `?${image.query}` : ""}`;
  const caption = (image) => {
    const given = new URLSearchParams(image.query);
    const seed = given.has("seed") ? `, ${given.has("index") ? `#${given.get("index")}, ` : ""}seed ${given.get("seed")}` : "";
    return image.title.charAt(0).toUpperCase() + image.title.slice(1) + seed;
  };

  // The strip.
  let drawn = parse(dsd.stored("localStorage", KEY));
  let only = false; // show starred images only

  function keep() {
    while (drawn.length > MOST) {
      const plain = drawn.findLastIndex((one) => !one.star);
      drawn.splice(plain < 0 ? drawn.length - 1 : plain, 1);
    }
    dsd.store("localStorage", KEY, JSON.stringify(drawn));
    show();
  }

  function add(images) {
    const known = new Map(drawn.map((one) => [one.id, one]));
    const fresh = images.filter((one) => one.query && !known.has(one.id));
    if (!fresh.length) return;
    drawn = [...fresh, ...drawn];
    keep();
  }

  function show() {
    const place = document.querySelector("#history .history-place");
    if (!place) return;
    const shown = only ? drawn.filter((one) => one.star) : drawn;
    const head = make("header", {},
      make("span", {textContent: "History"}),
      make("button", {type: "button", className: "action", id: "only-stars", ariaPressed: String(only), textContent: "Starred",
        onclick: () => { only = !only; show(); }}),
      make("button", {type: "button", className: "action", id: "forget", textContent: "Clear",
        title: "Remove the images that have no star", onclick: () => { drawn = drawn.filter((one) => one.star); keep(); }}));
    const list = make("div", {className: "row", tabIndex: -1}, ...shown.map((one) => make("button", {
      type: "button", className: one.star ? "old star" : "old", title: caption(one), ariaLabel: caption(one),
      "data-act": "choose", "data-image": one.id, "data-query": one.query, "data-title": one.title, "data-file": one.file,
    }, make("img", {alt: "", loading: "lazy", decoding: "async", src: url(one)}))));
    place.replaceChildren(...(drawn.length ? [make("section", {className: "history", ariaLabel: "History"}, head, list)] : []));
  }

  function star(image) {
    add([image]);
    const found = drawn.find((one) => one.id === image.id);
    if (found) found.star = !found.star;
    keep();
    return Boolean(found?.star);
  }
  const starred = (image) => Boolean(drawn.find((one) => one.id === image.id)?.star);

  // The large view: arrows move through the images of the place from which it was opened.
  let images = [], number = 0, pinned = null, dialog = null;

  function view(list, start) {
    [images, number, pinned] = [list, start, null];
    if (!dialog) {
      dialog = make("dialog", {id: "lightbox", ariaLabel: "Image"});
      dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
      dialog.addEventListener("keydown", (event) => {
        if (event.key === "Escape") event.stopPropagation();
        const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (step) { event.preventDefault(); move(step); }
      });
      document.body.append(dialog);
    }
    draw();
    dialog.showModal();
  }

  function move(step) {
    number = (number + step + images.length) % images.length;
    draw();
  }

  function draw() {
    const image = images[number];
    const button = (words, onclick, more = {}) => make("button", {type: "button", className: "action", textContent: words, onclick, ...more});
    const side = (one) => make("figure", {}, make("img", {alt: caption(one), src: url(one)}), make("figcaption", {textContent: caption(one)}));
    const bar = make("div", {className: "actions"},
      button("Previous", () => move(-1), {id: "light-previous"}), button("Next", () => move(1), {id: "light-next"}),
      ...(image.query ? [button(starred(image) ? "Starred" : "Star", () => { star(image); draw(); },
        {id: "light-star", ariaPressed: String(starred(image))})] : []),
      button(pinned ? "Stop comparing" : "Compare", () => { pinned = pinned ? null : image; draw(); }, {id: "light-compare", ariaPressed: String(Boolean(pinned))}),
      ...(image.query ? [button("Copy link", (event) => copyLink(event.target, image.query))] : []),
      make("a", {className: "action", download: image.file, href: url(image), textContent: "Save PNG"}),
      button("Close", () => dialog.close(), {id: "light-close"}));
    const focus = dialog.querySelector(":focus")?.id;
    dialog.replaceChildren(
      make("div", {className: "sides-by-side"}, ...(pinned ? [side(pinned), side(image)] : [side(image)])),
      make("p", {className: "line", role: "status", textContent: `${number + 1} of ${images.length}` + (pinned ? ", compared with the one on the left" : "")}),
      bar);
    (byId(focus) ?? byId("light-next")).focus();
  }

  // Links and code to copy, and files.
  async function copy(button, text) {
    const before = button.textContent;
    try { await navigator.clipboard.writeText(text); } catch { // without a secure context
      const area = make("textarea", {value: text});
      (dialog?.open ? dialog : document.body).append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  }
  const copyLink = (button, query) => copy(button, window.dsd.address(query));

  async function saveAll(button) {
    const ids = [...document.querySelectorAll(`#${button.dataset.all} .card[data-image]`)].map((one) => one.dataset.image);
    const told = byId("refused");
    try {
      const answer = await fetch(`studio/images.zip?ids=${ids.join(",")}`);
      if (!answer.ok) throw new Error(await answer.text());
      const address = URL.createObjectURL(await answer.blob());
      make("a", {href: address, download: "dsd-images.zip"}).click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
      told.hidden = true;
    } catch (error) {
      told.textContent = error instanceof TypeError ? "the images cannot be fetched now: try again" : error.message;
      told.hidden = false;
    }
  }

  document.addEventListener("click", (event) => {
    const code = event.target.closest?.("[data-copy]");
    if (code) copy(code, code.closest(".code").querySelector("code").textContent);
    const link = event.target.closest?.("[data-copy-link]");
    if (link) copyLink(link, link.dataset.copyLink);
    const all = event.target.closest?.("[data-all]");
    if (all) saveAll(all);
    const enlarge = event.target.closest?.(".enlarge");
    const frame = event.target.closest?.(".strip figure[data-image]");
    const opened = enlarge?.closest("[data-image]") ?? frame;
    if (!opened) return;
    const chosen = described(opened);
    const beside = frame ? frame.parentElement : document.querySelector(enlarge.closest("#details") ? "#board" : `#${enlarge.closest("[id$=-details]").id.replace("details", "board")}`);
    const list = [...beside.querySelectorAll("[data-image]")].map(described);
    const place = list.findIndex((one) => one.id === chosen.id);
    if (place >= 0) view(list, place);
    else view([chosen, ...drawn.filter((one) => one.id !== chosen.id)], 0); // of the strip
  });

  // The images of the board, once all are drawn: soon after a change, and at the latest when the page is left.
  let timer = 0;
  function record() {
    clearTimeout(timer);
    timer = 0;
    if (document.querySelector("#board .drawing")) return;
    add([...document.querySelectorAll("#board .card[data-image]")].map(described));
    if (drawn.length && !document.querySelector("#history section")) show();
  }
  addEventListener("pagehide", () => { if (timer) record(); });
  new MutationObserver((changes) => {
    // An error stands above the images, which may be out of view.
    for (const change of changes) for (const node of change.addedNodes) {
      if (node.matches?.(".callout") && node.closest("[id$=-message]")) node.scrollIntoView({block: "nearest"});
    }
    timer ||= setTimeout(record, 300);
  }).observe(document.documentElement, {childList: true, subtree: true, attributes: true, attributeFilter: ["data-image"]});
  addEventListener("storage", (event) => { if (event.key === KEY) { drawn = parse(event.newValue); show(); } });
})();
