// The page's own script: server state, light and dark, keyboard. It makes requests to the page's own server only.
(() => {
  const SECONDS = 2;
  let up = null;
  let version = "";
  let process = ""; // of the page's server
  let largest = Infinity; // bytes of an upload
  let failures = 0; // requests in a row that were not answered

  const byId = (id) => document.getElementById(id);

  function words(state) {
    if (!state.up) return "server down";
    const ahead = state.waiting ? `, ${state.waiting} waiting` : "";
    return state.running ? `drawing ${state.running}${ahead}` : "ready";
  }

  function fact(name, value) {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }

  function show(state) {
    const pill = byId("pill"), down = byId("down"), now = byId("now");
    if (!pill) return;
    pill.textContent = words(state);
    pill.dataset.up = state.up;
    down.hidden = state.up;
    down.textContent = state.up ? "" : `${state.sentence} This page keeps trying.`;
    if (now) {
      const list = document.createElement("dl");
      list.className = "facts numbers";
      if (state.up) {
        list.append(
          ...fact("Images running", state.running), ...fact("Images waiting", state.waiting),
          ...fact("Queued work", `${state.seconds_ahead.toFixed(1)} s`), ...fact("Time per row", `${state.row_ms.toFixed(1)} ms`),
          ...fact("Throughput", state.rows_per_s === null ? "-" : `${state.rows_per_s.toFixed(0)} rows/s`));
      } else list.append(...fact("Server", "down"));
      now.replaceChildren(list);
    }
    if (!state.up) lost();
    if (state.body_mb) largest = 1e6 * state.body_mb;
    // Another process has neither this visitor's photos nor the work under way: loaded again, the page restores both.
    if (state.up && process && state.process !== process && reloads()) return location.reload();
    // A page that was opened before its server was up is still empty.
    if (state.up && !document.querySelector("#told [data-classes]")) {
      if (up === false || document.querySelector("#picker .callout")) window.dsd.open();
    } else if (state.up && (up === false || (version && state.version !== version))) {
      byId("follow")?.click(); // another model, or images of another checkpoint
    }
    if (state.up) [version, process] = [state.version, process || state.process];
    up = state.up;
  }

  // Whether the page may reload: once a minute, because a balancer may send each request to another process.
  function reloads() {
    const last = Number(dsd.stored("sessionStorage", "dsd-reloaded") ?? 0);
    return Date.now() - last >= 60_000 && dsd.store("sessionStorage", "dsd-reloaded", Date.now());
  }

  // Work under way ended with the connection. Once it is back, the page reloads and draws the rest.
  function lost() {
    for (const one of document.querySelectorAll(".progress")) {
      const done = one.querySelector(".words")?.textContent.match(/^\d+ of \d+/)?.[0];
      const line = document.createElement("p");
      line.className = "line";
      line.textContent = `The connection was lost${done ? ` after ${done}` : ""}. The page continues when the server is back.`;
      one.replaceWith(line);
    }
    for (const toast of document.querySelectorAll(".toast-body")) { // ours says more
      if (/connection/i.test(toast.textContent)) toast.style.display = "none";
    }
  }

  // Stop is a request to the server of this page. Gradio owns the button's `disabled`, so it is made inert instead.
  function allowStop(allowed) {
    for (const button of document.querySelectorAll("button[id$=-stop]")) button.inert = !allowed;
  }

  // A proxy that serves the page below a path, and does not tell the server: then most requests miss it.
  function misled() {
    const [here, served] = [location, new URL(gradio_config.root)].map((one) => one.pathname.replace(/\/$/, ""));
    if (here === served) return false;
    const [pill, down] = [byId("pill"), byId("down")];
    pill.textContent = "not connected";
    pill.dataset.up = down.hidden = false;
    down.textContent = `This page cannot reach its server: the proxy must send it the header X-Forwarded-Prefix: ${here || "/"}`;
    return true;
  }

  async function look() {
    if (!document.hidden) {
      try {
        const answer = await fetch("studio/state", {signal: AbortSignal.timeout(8000)});
        if (!answer.ok) throw new Error();
        show(await answer.json());
        failures = 0;
      } catch {
        // One may fail because the browser or the network is busy.
        if (++failures >= 2) show({up: false, sentence: "The server of this page does not respond."});
      }
      allowStop(failures < 2);
    }
    setTimeout(look, 1000 * SECONDS);
  }

  function shade(dark) {
    document.body.classList.toggle("dark", dark);
    const button = byId("shade");
    if (button) button.textContent = dark ? "Light" : "Dark";
  }

  document.addEventListener("click", (event) => {
    if (event.target.id === "shade") {
      const dark = !document.body.classList.contains("dark");
      dsd.store("localStorage", "dsd-dark", dark);
      shade(dark);
    }
    const chosen = event.target.closest?.(".board [data-act=choose]"); // the board is not sent again
    for (const one of chosen?.closest(".board").querySelectorAll("[data-act=choose]") ?? []) one.ariaPressed = String(one === chosen);
    const go = event.target.closest?.("button[id$=-go]");
    if (go) follow(go);
  });

  // Where results appear below the controls, out of view: scroll to them once they are there.
  const RESULTS = {"generate-go": "board", "edit-go": "edit-board", "inpaint-go": "inpaint-board", "walk-go": "walk-strip", "way-go": "way"};
  function follow(go) {
    const place = byId(RESULTS[go.id]);
    if (!place || place.parentElement.getBoundingClientRect().top < 0.55 * innerHeight) return;
    const seen = new MutationObserver(() => {
      if (!place.parentElement.querySelector(".drawing, .progress, .strip, .callout")) return;
      seen.disconnect();
      place.scrollIntoView({block: "start"}); // at once: later updates would interrupt smooth scrolling
    });
    seen.observe(place.parentElement, {childList: true, subtree: true});
  }

  // A file above the server's limit is not sent: its answer would not be a readable sentence.
  function refuse(event) {
    const refused = byId("refused");
    const files = [...(event.dataTransfer?.files ?? event.clipboardData?.files ?? event.target.files ?? [])];
    if (!refused || !files.length) return;
    const file = files.find((one) => one.size > largest);
    refused.hidden = !file;
    if (!file) return;
    refused.textContent = `a file may have at most ${largest / 1e6} MB, ${file.name} has ` +
      `${(file.size / 1e6).toFixed(1)} MB: choose a smaller image`;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (event.target.type === "file") event.target.value = "";
    scrollTo({top: 0, behavior: "smooth"});
  }
  for (const kind of ["change", "drop", "paste"]) window.addEventListener(kind, refuse, true);

  // A class whose image could not be drawn: hide the broken image and retry.
  document.addEventListener("error", (event) => {
    const image = event.target;
    if (image.tagName !== "IMG" || !image.src.includes("/studio/class/")) return;
    image.style.visibility = "hidden";
    setTimeout(() => { image.src = image.src.replace(/(&again=.*)?$/, `&again=${Date.now()}`); }, 4000);
  }, true);
  document.addEventListener("load", (event) => { if (event.target.tagName === "IMG") event.target.style.visibility = ""; }, true);

  // Ctrl+Enter starts and Escape stops work on the visible tab.
  document.addEventListener("keydown", (event) => {
    const kind = event.key === "Enter" && (event.ctrlKey || event.metaKey) ? "go" : event.key === "Escape" ? "stop" : "";
    if (!kind) return;
    const button = [...document.querySelectorAll(`button[id$="-${kind}"]`)].find((one) => one.offsetParent && !one.disabled && !one.inert);
    if (button) {
      event.preventDefault();
      button.click();
    }
  });

  const kept = dsd.stored("localStorage", "dsd-dark");
  const begin = () => {
    if (!byId("pill")) return setTimeout(begin, 50);
    dispatchEvent(new Event("resize")); // the tabs measured themselves before the style was loaded
    shade(kept === null ? document.body.classList.contains("dark") : kept === "true");
    if (!misled()) look();
  };
  begin();
})();
