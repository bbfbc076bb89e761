// What can go wrong before page.js runs. A classic script, so that browsers without modules run it too.
(function () {
  "use strict";
  function say(text, canRetry) {
    document.addEventListener("DOMContentLoaded", function () {
      tell(text, canRetry);
    });
    if (document.readyState !== "loading") tell(text, canRetry);
  }
  function tell(text, canRetry) {
    var notices = document.getElementById("notices");
    var opening = document.getElementById("opening");
    if (!notices || notices.firstChild) return;
    var notice = document.createElement("div");
    notice.className = "notice error";
    notice.appendChild(document.createElement("p")).textContent = text;
    if (canRetry) {
      var again = document.createElement("button");
      again.type = "button";
      again.textContent = "Try again";
      again.onclick = function () {
        location.reload();
      };
      notice.appendChild(again);
    }
    notices.appendChild(notice);
    if (opening) opening.hidden = true;
  }
  if (location.protocol === "file:")
    say(
      "Browsers do not run the network from a file. Serve this folder instead: python -m http.server, then open http://localhost:8000.",
    );
  else if (typeof WebAssembly !== "object" || !("noModule" in document.createElement("script")))
    say(
      "This browser cannot run WebAssembly, which the network needs. Current versions of Chrome, Edge, Firefox and Safari can, unless WebAssembly is switched off, as in Lockdown Mode on an iPhone.",
    );
  function sayDamaged() {
    if (document.documentElement.hasAttribute("data-running")) return; // page.js runs, and shows its errors itself
    say("Part of this page is damaged. Try again; if that does not help, the whole folder must be copied again.", true);
  }
  // A module that cannot be fetched, or one that it imports: error events of elements do not bubble, but can be
  // captured. A module that is cut or damaged: the event is the window's. Errors of extensions are not the page's.
  window.addEventListener(
    "error",
    function (event) {
      if (event.target && event.target.tagName === "SCRIPT")
        say("Part of this page could not be fetched. Check the connection, then try again.", true);
      else if (event.filename && event.filename.indexOf(location.origin + "/") === 0) sayDamaged();
    },
    true,
  );
  // A page.js that is empty, or cut between two statements, has no error. Browsers run modules before this event.
  window.addEventListener("load", sayDamaged);
})();
