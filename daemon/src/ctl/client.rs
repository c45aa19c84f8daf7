//! The bus, as `ftctl` uses it.

use std::collections::HashMap;

use futures_lite::future::block_on;
use serde_json::{json, Value};
use zbus::{Connection, DBusError, DynamicType, OwnedObjectPath, OwnedVariant, Variant};

use crate::{BUS_NAME, ROOT};

pub const MANAGER: &str = "org.ftvm.Manager1";
pub const MACHINE: &str = "org.ftvm.Machine1";
pub const FT: &str = "org.ftvm.FaultTolerance1";

pub type Dict = HashMap<String, OwnedVariant>;

pub struct Client {
    pub connection: Connection,
}

/// The sentence of an error, without its name on the bus.
fn sentence(error: zbus::Error) -> String {
    let (name, text) = match &error {
        zbus::Error::FDO(e) => (e.name().to_string(), e.description().map(str::to_owned)),
        zbus::Error::MethodError(name, text, _) => (name.to_string(), text.clone()),
        _ => return error.to_string(),
    };
    let text = text.unwrap_or_else(|| name.clone());
    match name.as_str() {
        "org.freedesktop.DBus.Error.ServiceUnknown" => "ftvmd does not run on this bus".into(),
        "org.freedesktop.DBus.Error.AccessDenied" => format!("access denied: {text}"),
        _ => text,
    }
}

impl Client {
    pub fn connect(session: bool) -> Result<Client, String> {
        let connection = block_on(async {
            if session {
                Connection::session().await
            } else {
                Connection::system().await
            }
        });
        let connection = connection.map_err(|e| format!("the bus cannot be reached: {e}"))?;
        Ok(Client { connection })
    }

    pub fn call<B, R>(&self, path: &str, interface: &str, method: &str, body: &B) -> Result<R, String>
    where
        B: serde::Serialize + DynamicType,
        R: serde::de::DeserializeOwned + zbus::Type,
    {
        let reply =
            block_on(self.connection.call_method(Some(BUS_NAME), path, Some(interface), method, body))
                .map_err(sentence)?;
        reply.body().deserialize().map_err(sentence)
    }

    pub fn manager<B, R>(&self, method: &str, body: &B) -> Result<R, String>
    where
        B: serde::Serialize + DynamicType,
        R: serde::de::DeserializeOwned + zbus::Type,
    {
        self.call(ROOT, MANAGER, method, body)
    }

    pub fn find(&self, name: &str) -> Result<String, String> {
        let path: OwnedObjectPath = self.manager("LookupByName", &name)?;
        Ok(path.as_str().to_owned())
    }

    pub fn properties(&self, path: &str, interface: &str) -> Result<Value, String> {
        let dict: Dict = self.call(path, "org.freedesktop.DBus.Properties", "GetAll", &interface)?;
        Ok(to_json(&dict))
    }
}

/// A dictionary, its keys in order.
pub fn to_json(dict: &Dict) -> Value {
    let mut keys: Vec<_> = dict.keys().collect();
    keys.sort();
    Value::Object(keys.into_iter().map(|k| (k.clone(), value(&dict[k]))).collect())
}

fn value(variant: &Variant<'_>) -> Value {
    match variant {
        Variant::U8(n) => json!(n),
        Variant::Bool(b) => json!(b),
        Variant::I16(n) => json!(n),
        Variant::U16(n) => json!(n),
        Variant::I32(n) => json!(n),
        Variant::U32(n) => json!(n),
        Variant::I64(n) => json!(n),
        Variant::U64(n) => json!(n),
        Variant::F64(n) => json!(n),
        Variant::Str(s) => json!(s.as_str()),
        Variant::ObjectPath(p) => json!(p.as_str()),
        Variant::Variant(inner) => value(inner),
        Variant::Array(items) => items.iter().map(value).collect(),
        Variant::Structure(s) => s.fields().iter().map(value).collect(),
        Variant::Dict(d) => {
            let pairs = d.iter().map(|(k, v)| (value(k).as_str().unwrap_or_default().to_owned(), value(v)));
            Value::Object(pairs.collect())
        }
        other => json!(other.to_string()),
    }
}

/// The members of a message.
pub fn arguments(message: &zbus::Message) -> Vec<Value> {
    let body = message.body();
    match body.deserialize::<zbus::Structure<'_>>() {
        Ok(structure) => structure.fields().iter().map(value).collect(),
        Err(_) => Vec::new(),
    }
}
