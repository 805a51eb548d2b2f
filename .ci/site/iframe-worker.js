// Browsers start no worker from a file: where the site is opened from a folder, its search runs in a hidden frame.
// The builder would ask another host for this (https://unpkg.com/iframe-worker), unless a script of that name is given.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.started = new Promise((resolve) => {
        this.frame.addEventListener("load", () => {
          const { contentDocument, contentWindow } = this.frame
          contentWindow.postMessage = (data) => {
            const copy = structuredClone(data)
            setTimeout(() => this.onmessage?.({ data: copy }))
          }
          const script = contentDocument.createElement("script")
          script.src = url
          script.onload = resolve
          script.onerror = (event) => this.onerror?.(event)
          contentDocument.body.append(script)
        }, { once: true })
      })
      document.body.append(this.frame)
    }

    postMessage(data) {
      const copy = structuredClone(data)
      this.started.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data: copy })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
