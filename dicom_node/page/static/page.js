// Keeps the page fresh, says loudly when it is not, and lets a keyboard move through the list.
"use strict";

(() => {
  const STALE_MS = 5000;
  let heard = Date.now(); // when the page last answered
  let ahead = Date.now() / 1000 - Number(document.body.dataset.now); // this clock less the node's, in seconds
  let pressed = false; // nothing moves away under a finger
  let typed = null; // what an update must not wipe out
  let unseen = null;

  const find = (id) => document.getElementById(id);
  const now = () => Date.now() / 1000 - ahead;

  function span(seconds) {
    const s = Math.max(0, Math.floor(seconds));
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
    if (s < 172800) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
    return `${Math.floor(s / 86400)} days`;
  }

  function tick() {
    for (const each of document.querySelectorAll("time[data-since]")) {
      each.textContent = span(now() - Number(each.dataset.since));
    }
    for (const each of document.querySelectorAll("time[data-until]")) {
      const left = Number(each.dataset.until) - now();
      each.textContent = left > 0 ? `in ${span(left)}` : "now";
    }
    if (!find("live")) return;
    const silent = Date.now() - heard;
    const stale = silent > STALE_MS;
    document.body.classList.toggle("is-stale", stale);
    find("stale").hidden = !stale;
    find("stale-for").textContent = span(silent / 1000);
  }

  function announce() {
    const columns = document.querySelector("[data-unseen]");
    if (!columns) return;
    const count = Number(columns.dataset.unseen);
    document.title = count ? `(${count}) scanside: triage` : "scanside: triage";
    if (unseen !== null && count > unseen) find("announcer").textContent = `${count} alerts not acknowledged`;
    unseen = count;
  }

  document.addEventListener("htmx:configRequest", (event) => {
    const digest = event.detail.elt.dataset.digest;
    if (digest) event.detail.parameters.have = digest;
  });
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (pressed) event.detail.shouldSwap = false; // the next one will
    const by = find("by");
    typed = by && event.detail.target.contains(by) ? by.value : null;
  });
  document.addEventListener("htmx:afterSwap", (event) => {
    event.detail.target.dataset.digest = event.detail.xhr.getResponseHeader("X-Digest");
    if (typed !== null && find("by")) find("by").value = typed;
    announce();
    tick();
    document.dispatchEvent(new CustomEvent("panel"));
  });
  document.addEventListener("htmx:afterRequest", (event) => {
    const answered = event.detail.xhr && event.detail.xhr.getResponseHeader("X-Now");
    if (!event.detail.successful || !answered) return;
    heard = Date.now();
    ahead = Date.now() / 1000 - Number(answered);
    if (find("updated")) find("updated").textContent = new Date(1000 * Number(answered)).toTimeString().slice(0, 8);
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    for (const each of document.querySelectorAll("[hx-trigger]")) htmx.trigger(each, "wake");
  });
  document.addEventListener("pointerdown", () => (pressed = true));
  for (const end of ["pointerup", "pointercancel", "dragend"]) {
    document.addEventListener(end, () => setTimeout(() => (pressed = false), 50));
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=range])")) return;
    if (event.key === "Escape" && find("back")) find("back").click();
    const rows = [...document.querySelectorAll(".rows a")];
    const step = { j: 1, k: -1 }[event.key];
    if (!rows.length || !step) return;
    const place = rows.indexOf(document.activeElement);
    rows[Math.min(rows.length - 1, Math.max(0, place < 0 ? 0 : place + step))].focus();
    event.preventDefault();
  });

  announce();
  tick();
  setInterval(tick, 500);
  if (find("unscripted")) find("unscripted").remove(); // last: whatever fails above leaves it there
})();
