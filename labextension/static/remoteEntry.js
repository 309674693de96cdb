// Says in JupyterLab what the start of a kernel waits for, such as a place in Slurm's queue. Written by hand: it
// imports nothing, so it needs no bundler.
'use strict';

{
  const EVENTS = 'https://events.jupyter.org/jupyter_server/kernel_actions/v1';

  function activate(app) {
    // The notification of each start that waits.
    const shown = new Map();
    app.serviceManager.events.stream.connect((_, event) => {
      if (event.schema_id !== EVENTS || !app.commands.hasCommand('apputils:notify')) {
        return;
      }
      const { action, kernel_id: kernel, msg: message, status } = event;
      const waiting = shown.get(kernel);
      // The server's own events, of what is over, have a status.
      if (status === undefined && action === 'start') {
        if (waiting === undefined) {
          const notice = { message, type: 'in-progress', options: { autoClose: false } };
          shown.set(kernel, app.commands.execute('apputils:notify', notice));
        } else {
          const command = 'apputils:update-notification';
          void waiting.then(id => app.commands.execute(command, { id, message, type: 'in-progress' }));
        }
        return;
      }
      if (waiting !== undefined && action !== 'interrupt') {
        shown.delete(kernel);
        void waiting.then(id => app.commands.execute('apputils:dismiss-notification', { id }));
      }
    });
  }

  const plugin = { id: 'curve-kernel:progress', autoStart: true, activate };
  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB['curve-kernel'] = {
    init: () => {},
    get: async () => () => ({ __esModule: true, default: plugin })
  };
}
