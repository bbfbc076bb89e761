// What the page adds to Gradio for keyboards, touch, screen readers and reduced motion, and sentences about what a
// browser refuses. It makes no requests.
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const calm = matchMedia("(prefers-reduced-motion: reduce)");

  function tell(sentence) {
    const place = byId("refused");
    if (!place) return;
    place.textContent = sentence;
    place.hidden = false;
    place.scrollIntoView({block: "nearest"});
  }

  // Groups with one tab stop, in which arrow keys move: tabs, classes, the wall, the board and the history.
  const GROUPS = [["[role=tablist]", "[role=tab]"], ["#picker .picker", ".only"], ["#wall .images", "button"],
    [".board", "button.card"], [".history .row", ".old"]];
  const marked = (one) => one.ariaSelected === "true" || one.ariaPressed === "true";

  function groupOf(element) {
    for (const [group, item] of GROUPS) {
      const around = element.closest?.(group);
      if (around && element.matches(item)) return all(item, around).filter((one) => one.offsetParent);
    }
    return null;
  }

  function stops() {
    for (const [group, item] of GROUPS) {
      for (const around of all(group)) {
        const items = all(item, around);
        const stop = items.find((one) => one === document.activeElement) ?? items.find(marked) ?? items[0];
        for (const one of items) if (one.tabIndex !== (one === stop ? 0 : -1)) one.tabIndex = one === stop ? 0 : -1;
      }
    }
  }

  function next(items, from, key) {
    const at = items.indexOf(from), flip = getComputedStyle(from).direction === "rtl" ? -1 : 1;
    if (key === "Home") return items[0];
    if (key === "End") return items.at(-1);
    if (key === "ArrowRight" || key === "ArrowLeft") return items[at + flip * (key === "ArrowRight" ? 1 : -1)];
    const here = from.getBoundingClientRect(), down = key === "ArrowDown";
    const rows = items.filter((one) => { // those of the nearest row in this direction
      const box = one.getBoundingClientRect();
      return down ? box.top > here.bottom - 4 : box.bottom < here.top + 4;
    });
    const distance = (one) => {
      const box = one.getBoundingClientRect();
      return 1000 * Math.abs(box.top - here.top) + Math.abs(box.left - here.left);
    };
    return rows.sort((a, b) => distance(a) - distance(b))[0];
  }

  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey && target.matches?.("input[type=number]")) {
      const go = all("button[id$=-go]", target.closest("[role=tabpanel]") ?? document).find((one) => one.offsetParent && !one.disabled);
      if (go) { event.preventDefault(); target.blur(); target.focus(); go.click(); }
      return;
    }
    if (event.key === "+" && target.matches?.("#picker .only")) return target.nextElementSibling.click();
    if (!/^(Arrow(Left|Right|Up|Down)|Home|End)$/.test(event.key) || event.altKey || event.ctrlKey || event.metaKey) return;
    const items = groupOf(target);
    const to = items && next(items, target, event.key);
    if (!items || !to) return;
    event.preventDefault();
    to.focus();
    if (to.getAttribute("role") === "tab") to.click();
    stops();
  });

  // The chosen classes are marked in the grid, which is not sent again.
  function markChosen() {
    const list = document.querySelector("#chosen [data-chosen]");
    if (!list) return;
    const chosen = new Set(JSON.parse(list.dataset.chosen).map(String));
    for (const one of all("#picker .only")) {
      const is = String(chosen.has(one.dataset.value));
      if (one.ariaPressed !== is) one.ariaPressed = is;
    }
  }

  // A press on the wall draws: once its class is chosen, Generate is pressed.
  let wanted = "";
  document.addEventListener("click", (event) => {
    const image = event.target.closest?.("#wall [data-act=only]");
    if (image) wanted = `[${image.dataset.value}]`;
    const jump = event.target.closest?.(".details [data-act]")?.dataset.act;
    jumping = ["edit", "from", "to", "inside"].includes(jump);
    const full = event.target.closest?.("[data-fullscreen]");
    if (full) document.fullscreenElement ? document.exitFullscreen() : full.closest(".compare").requestFullscreen?.();
    const pause = event.target.closest?.("[data-pause]");
    if (pause) freeze(pause.closest(".moving"), pause.ariaPressed !== "true");
  });
  function drawWanted() {
    if (!wanted || document.querySelector("#chosen [data-chosen]")?.dataset.chosen !== wanted) return;
    wanted = "";
    byId("generate-go")?.click();
  }

  // After a jump to another tab the focus is on that tab.
  let jumping = false, shown = "";
  function followJump() {
    const tab = document.querySelector("#tabs > .tab-wrapper [role=tab][aria-selected=true]");
    const name = tab?.textContent.trim() ?? "";
    if (name === shown) return;
    shown = name;
    if (!jumping) return;
    jumping = false;
    scrollTo(0, 0);
    tab.focus();
  }

  // The line between a photo and its reconstruction.
  document.addEventListener("input", (event) => {
    if (event.target.matches?.("[data-compare]")) event.target.parentElement.style.setProperty("--at", `${event.target.value}%`);
  });

  // An animation can be stopped, and does not start where the system asks for less motion.
  function freeze(section, still) {
    const image = section.querySelector("img"), button = section.querySelector("[data-pause]");
    section.querySelector("canvas")?.remove();
    if (still) {
      const side = image.naturalWidth || 256;
      const canvas = Object.assign(document.createElement("canvas"), {width: side, height: side});
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", image.alt);
      canvas.getContext("2d").drawImage(image, 0, 0);
      image.before(canvas);
    }
    section.classList.toggle("still", still);
    button.ariaPressed = String(still);
    button.textContent = still ? "Play" : "Pause";
  }
  function calmDown() {
    if (!calm.matches) return;
    for (const image of all(".moving:not([data-calm]) img")) {
      const section = image.closest(".moving");
      section.dataset.calm = "";
      image.complete && image.naturalWidth ? freeze(section, true) : image.addEventListener("load", () => freeze(section, true), {once: true});
    }
  }

  // The labels of Gradio's drop zones differ from the words in them, which are enough.
  function relabel() {
    for (const zone of all("button.upload-container[aria-label]")) if (zone.textContent.trim()) zone.removeAttribute("aria-label");
    for (const search of all("#class-search textarea:not([enterkeyhint])")) search.setAttribute("enterkeyhint", "search");
    for (const [end, keys, words] of [["go", "Control+Enter", "Ctrl+Enter"], ["stop", "Escape", "Escape"]]) {
      for (const button of all(`button[id$=-${end}]:not([title])`)) {
        button.title = words;
        button.setAttribute("aria-keyshortcuts", keys);
      }
    }
    for (const card of all(".card-text")) { // keys scroll only what has the focus
      const scrolls = card.scrollWidth > card.clientWidth;
      if (scrolls === card.hasAttribute("tabindex")) continue;
      const region = {tabindex: 0, role: "region", "aria-label": "Model card"};
      for (const [name, value] of Object.entries(region)) scrolls ? card.setAttribute(name, value) : card.removeAttribute(name);
    }
  }

  // Camera and clipboard: a sentence says what the browser refuses.
  document.documentElement.classList.toggle("insecure", !isSecureContext);
  const media = navigator.mediaDevices;
  if (media?.getUserMedia) {
    const ask = media.getUserMedia.bind(media);
    media.getUserMedia = (settings) => ask(settings).catch((error) => {
      tell({
        NotAllowedError: "the browser does not let this page use the camera: allow it in the address bar, or upload a photo",
        NotFoundError: "this device has no camera that the browser can use: upload a photo",
      }[error.name] ?? `the camera cannot be used (${error.message || error.name}): close other programs that use it, or upload a photo`);
      throw error;
    });
  }
  if (navigator.clipboard?.read) {
    const read = navigator.clipboard.read.bind(navigator.clipboard);
    navigator.clipboard.read = async () => {
      try {
        const items = await read();
        if (!items.some((item) => item.types.some((type) => type.startsWith("image/")))) tell("the clipboard holds no image: copy an image first");
        return items;
      } catch (error) {
        tell("the browser does not let this page read the clipboard: press Ctrl+V instead, or upload a photo");
        throw error;
      }
    };
  }

  // An image that is pasted anywhere goes to the visible photo, or to Your photo.
  const PHOTOS = ["photo", "inside-photo", "from-photo", "to-photo"];
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file || event.defaultPrevented) return;
    event.preventDefault();
    const visible = PHOTOS.map(byId).filter((one) => one?.offsetParent);
    const place = visible.find((one) => !one.querySelector("img")) ?? visible[0];
    if (!place) all("#tabs [role=tab]").find((one) => one.textContent.trim() === "Your photo")?.click();
    put(place?.id ?? "photo", file, 40);
  });
  function put(id, file, tries) {
    const input = document.querySelector(`#${id} input[type=file]`);
    if (!input) return tries && setTimeout(put, 50, id, file, tries - 1);
    const given = new DataTransfer();
    given.items.add(file);
    input.files = given.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
  }

  // The editor paints with WebGL.
  const canvas = document.createElement("canvas");
  document.documentElement.classList.toggle("no-webgl", !(canvas.getContext("webgl2") ?? canvas.getContext("webgl")));

  let due = false;
  function look() {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      markChosen(); stops(); followJump(); drawWanted(); calmDown(); relabel();
    });
  }
  addEventListener("resize", look);
  new MutationObserver(look).observe(document.documentElement, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["aria-selected", "aria-pressed", "data-chosen", "aria-label"],
  });
})();
