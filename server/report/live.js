"use strict";
// Keeps the page equal to what the server would send now, changing only what differs.

const SECOND = 1000;
let shown = -1;

function morph(old, now) {
  if (old.nodeType !== now.nodeType || old.nodeName !== now.nodeName) {
    old.replaceWith(now.cloneNode(true));
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== now.nodeValue) old.nodeValue = now.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) {
    // Whoever opened a table keeps it open.
    if (!now.hasAttribute(name) && !(old.nodeName === "DETAILS" && name === "open")) old.removeAttribute(name);
  }
  for (const { name, value } of [...now.attributes]) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const before = [...old.childNodes];
  const after = [...now.childNodes];
  before.slice(after.length).forEach((node) => node.remove());
  after.forEach((node, place) => {
    if (place < before.length) morph(before[place], node);
    else old.appendChild(node.cloneNode(true));
  });
}

async function update() {
  try {
    const state = await (await fetch("state", { cache: "no-store" })).json();
    if (state.version !== shown) {
      const answer = await fetch("./", { cache: "no-store" });
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        morph(document.querySelector("main"), page.querySelector("main"));
        shown = state.version;
      }
    }
    if (!state.ended) setTimeout(update, SECOND);
  } catch {
    const status = document.querySelector(".status");
    if (document.querySelector("main").dataset.status === "running") status.textContent = "no connection";
    setTimeout(update, 5 * SECOND);
  }
}

update();
