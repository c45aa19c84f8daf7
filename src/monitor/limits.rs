//! I/O limits in the monitor's words.

use ftvm_block::throttle::Limits;
use ftvm_qmp::QmpError;
use serde_json::{json, Map, Value};

use crate::cli::drive;
use crate::cli::keyval::Params;

const UNITS: [&str; 2] = ["bps", "iops"];
const KINDS: [(&str, &str); 3] = [("", "total"), ("_rd", "read"), ("_wr", "write")];

/// The limits of `block_set_io_throttle`: the command line's, under other names.
pub fn from_arguments(a: &Map<String, Value>) -> Result<Limits, QmpError> {
    let mut params = Params::default();
    let mut put = |from: String, to: String| -> Result<(), QmpError> {
        match a.get(&from).map(Value::as_u64) {
            None => Ok(()),
            Some(Some(n)) => {
                params.set(&to, &n.to_string());
                Ok(())
            }
            Some(None) => Err(QmpError::generic("bps/iops/max values must be within [0, 1000000000000000]")),
        }
    };
    for unit in UNITS {
        for (short, long) in KINDS {
            put(format!("{unit}{short}"), format!("throttling.{unit}-{long}"))?;
            put(format!("{unit}{short}_max"), format!("throttling.{unit}-{long}-max"))?;
            put(format!("{unit}{short}_max_length"), format!("throttling.{unit}-{long}-max-length"))?;
        }
    }
    put("iops_size".into(), "throttling.iops-size".into())?;
    drive::limits(&params).map_err(|e| QmpError::generic(e.to_string()))
}

/// Put limits into a node's entry.
pub fn describe(limits: &Limits, entry: &mut Value) {
    for (unit, list) in UNITS.iter().zip([&limits.bytes, &limits.requests]) {
        for ((short, _), limit) in KINDS.iter().zip(list) {
            let name = format!("{unit}{short}");
            if limit.max > 0 {
                entry[format!("{name}_max")] = json!(limit.max);
                entry[format!("{name}_max_length")] = json!(limit.length.max(1));
            }
            entry[name] = json!(limit.average);
        }
    }
    if limits.request_size > 0 {
        entry["iops_size"] = json!(limits.request_size);
    }
}
