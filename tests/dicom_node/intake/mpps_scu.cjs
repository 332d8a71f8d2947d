// A scanner's performed procedure step by dcmjs-dimse, another implementation of DIMSE than the node's.
// node mpps_scu.cjs PORT STEP_UID SERIES_UID SOP_INSTANCE_UID...
const { createRequire } = require('module');
const { join } = require('path');
const { Client, Dataset, log, requests } = createRequire(join(process.env.SCANSIDE_DCMJS, 'x'))('dcmjs-dimse');
const [port, step, series, ...instances] = process.argv.slice(2);
const MPPS = '1.2.840.10008.3.1.2.3.3', CT = '1.2.840.10008.5.1.4.1.1.2';

const create = new requests.NCreateRequest(MPPS, step);
create.setDataset(new Dataset({ PerformedProcedureStepStatus: 'IN PROGRESS', Modality: 'CT' }));
const set = new requests.NSetRequest(MPPS, step);
set.setDataset(new Dataset({
  PerformedProcedureStepStatus: 'COMPLETED',
  PerformedSeriesSequence: [{
    SeriesInstanceUID: series,
    ReferencedImageSequence: instances.map((uid) => ({ ReferencedSOPClassUID: CT, ReferencedSOPInstanceUID: uid })),
  }],
}));
log.level = 'silent';
const client = new Client();
for (const request of [create, set]) {
  request.on('response', (response) => {
    console.log(`status ${response.getStatus().toString(16)}`);
  });
  client.addRequest(request);
}
client.on('networkError', (error) => { console.error(error); process.exit(1); });
client.on('closed', () => process.exit(0));
client.send('127.0.0.1', Number(port), 'CT1', 'SCANSIDE');
