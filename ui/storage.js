// Storage of this browser. It may be full or forbidden, by a visitor's settings: then the page remembers nothing, and all
// else works.
window.dsd = {
  // kind: "sessionStorage", for this tab of the browser, or "localStorage". Where storage is forbidden, naming it throws.
  stored: (kind, key) => { try { return window[kind].getItem(key); } catch { return null; } },
  // Returns whether the value is stored.
  store: (kind, key, value) => { try { window[kind].setItem(key, value); return true; } catch { return false; } },
};
