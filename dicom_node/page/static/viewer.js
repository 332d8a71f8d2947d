// A stack of slices to turn through: wheel, keys, swipe and slider, at three windows, with what was found on it or not.
// In the page the slices come from an address; in a report they are in it, under #stack.
"use strict";

(() => {
  const find = (id) => document.getElementById(id);
  const viewer = find("viewer");
  if (!viewer) return;
  const AHEAD = 4; // slices to load before they are asked for
  const MOST_KEPT = 600; // pictures
  const NOTCH = 40; // pixels of a wheel or of a swipe for a slice
  const buttons = [...viewer.querySelectorAll("[data-window]")];
  const pictures = new Map();
  let slices = [];
  let place = 0;
  let moved = false; // by a person
  let shown = buttons[0];
  let masked = true;
  let stack = null;
  let turned = 0;

  const address = (slice) => (slice.pictures ? slice.pictures[shown.dataset.window] : `${slice.picture}${shown.dataset.window}.png`);

  function load(source) {
    if (!pictures.has(source)) {
      if (pictures.size > MOST_KEPT) pictures.delete(pictures.keys().next().value);
      const image = new Image();
      image.src = source;
      pictures.set(source, image);
    }
    return pictures.get(source);
  }

  function show() {
    const slice = slices[place];
    find("empty").hidden = Boolean(slice);
    if (!slice) return;
    const source = address(slice);
    load(source);
    find("slice").src = source;
    find("slice").width = slice.size[0];
    find("slice").height = slice.size[1];
    find("slice").alt = `slice ${place + 1} of ${slices.length}`;
    find("mask").hidden = !(masked && slice.mask);
    if (slice.mask) find("mask").src = load(slice.mask).src;
    else find("mask").removeAttribute("src");
    find("place").value = place;
    find("place").setAttribute("aria-valuetext", `${place + 1} of ${slices.length}`);
    const classes = slice.classes.length ? `, ${slice.classes.join(", ")}` : "";
    find("corner").textContent = `${place + 1}/${slices.length}  image ${slice.number}\n${shown.dataset.text}`;
    find("said").textContent = `slice ${place + 1} of ${slices.length}${classes}`;
    for (let step = 1; step <= AHEAD; step += 1) {
      for (const near of [slices[place + step], slices[place - step]]) {
        if (!near) continue;
        load(address(near));
        if (near.mask) load(near.mask);
      }
    }
  }

  function go(to) {
    moved = true;
    place = Math.min(slices.length - 1, Math.max(0, to));
    show();
  }

  function choose(button) {
    shown = button;
    for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
    show();
  }

  function toggle() {
    masked = !masked;
    find("overlay").setAttribute("aria-pressed", String(masked));
    show();
  }

  function take(told) {
    const before = slices[place];
    slices = told.slices;
    [find("left").textContent, find("right").textContent] = told.sides;
    find("place").max = Math.max(0, slices.length - 1);
    const same = before ? slices.findIndex((one) => one.number === before.number && address(one) === address(before)) : -1;
    place = moved && same >= 0 ? same : told.key;
    strip(told.colours);
    show();
  }

  // what shows which class, along the slider
  function strip(colours) {
    const marks = [];
    slices.forEach((slice, index) => {
      slice.classes.forEach((name, row) => {
        const mark = document.createElementNS("http://www.w3.org/2000/svg", "rect");
        const high = 10 / slice.classes.length;
        const wide = 100 / slices.length;
        for (const [key, value] of Object.entries({ x: index * wide, y: row * high, width: wide + 0.05, height: high })) {
          mark.setAttribute(key, value);
        }
        mark.setAttribute("fill", colours[name] || "#cdd7e1");
        marks.push(mark);
      });
    });
    find("strip").replaceChildren(...marks);
  }

  async function refresh() {
    const now = document.querySelector("[data-stack]");
    if (!viewer.dataset.source || (now && now.dataset.stack === stack)) return;
    const wanted = now ? now.dataset.stack : null;
    try {
      const answer = await fetch(viewer.dataset.source);
      if (!answer.ok) return;
      take(await answer.json());
      stack = wanted;
    } catch {
      // the page does not answer: the banner says so, and the next update asks again
    }
  }

  find("place").addEventListener("input", (event) => go(Number(event.target.value)));
  find("overlay").addEventListener("click", toggle);
  for (const button of buttons) button.addEventListener("click", () => choose(button));
  find("stage").addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      turned += event.deltaMode ? NOTCH * Math.sign(event.deltaY) : event.deltaY;
      const steps = Math.trunc(turned / NOTCH);
      turned -= steps * NOTCH;
      if (steps) go(place + steps);
    },
    { passive: false },
  );

  let held = null;
  find("stage").addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, place };
    find("stage").setPointerCapture(event.pointerId);
  });
  find("stage").addEventListener("pointermove", (event) => {
    if (!held) return;
    const step = Math.max(6, find("stage").clientWidth / Math.max(20, slices.length)); // once across is the whole head
    const to = held.place + Math.round((event.clientX - held.x) / step);
    if (to !== place) go(to);
  });
  for (const end of ["pointerup", "pointercancel"]) find("stage").addEventListener(end, () => (held = null));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=range])")) return;
    const steps = { ArrowUp: -1, ArrowLeft: -1, k: -1, ArrowDown: 1, ArrowRight: 1, j: 1, PageUp: -5, PageDown: 5 };
    const button = buttons.find((one) => one.dataset.key === event.key);
    if (event.key in steps) go(place + steps[event.key]);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(slices.length - 1);
    else if (button) choose(button);
    else if (event.key === "m") toggle();
    else return;
    event.preventDefault();
  });

  const inlined = find("stack");
  if (inlined) take(JSON.parse(inlined.textContent));
  document.addEventListener("panel", refresh);
  refresh();
})();
