"use strict";
// Refreshes the sections that changed, in place: no flash, no lost place, focus or open tooltip. The page is whole without it.
(() => {
  const every = 5000;
  const marks = (line) => [...line.querySelectorAll("a")];
  const rove = () => {
    // One stop of the Tab key for each timeline; the arrow keys move within it.
    for (const line of document.querySelectorAll(".line")) {
      marks(line).forEach((mark, place, all) => { mark.tabIndex = place === all.length - 1 ? 0 : -1; });
    }
  };
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const line = event.target.closest ? event.target.closest(".line") : null;
    if (!line || (!step && event.key !== "Escape")) return;
    if (event.key === "Escape") { event.target.blur(); return; }
    const all = marks(line);
    const next = all[all.indexOf(event.target) + step];
    if (next) { event.preventDefault(); event.target.tabIndex = -1; next.tabIndex = 0; next.focus(); }
  });
  const inUse = (part) => part.contains(document.activeElement) || part.querySelector(".mark:hover") !== null;
  const stale = document.getElementById("stale");
  const answers = (well) => {
    if (well === stale.hidden) return;
    stale.hidden = well;
    if (!well) stale.querySelector("span").textContent = new Date().toLocaleTimeString();
  };
  const seen = new Map();
  for (const part of document.querySelectorAll("[data-live]")) seen.set(part.id, part.innerHTML);
  const refresh = async () => {
    if (document.hidden) return;
    let text;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (!answer.ok) throw new Error(answer.status);
      text = await answer.text();
    } catch { answers(false); return; }
    answers(true);
    const fresh = new DOMParser().parseFromString(text, "text/html");
    document.title = fresh.title;
    for (const part of document.querySelectorAll("[data-live]")) {
      const other = fresh.getElementById(part.id);
      if (!other || inUse(part)) continue;
      if (part.className !== other.className) part.className = other.className;
      if (seen.get(part.id) !== other.innerHTML) {
        seen.set(part.id, other.innerHTML);
        part.innerHTML = other.innerHTML;
      }
    }
    rove();
  };
  rove();
  setInterval(refresh, every);
  document.addEventListener("visibilitychange", refresh);
})();
