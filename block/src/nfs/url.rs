//! `nfs://HOST[:PORT]/PATH/IMAGE[?uid=N&gid=N&...]`, as libnfs and QEMU write it.

use crate::iscsi::{host_port, unescape};

/// A server's export and what we say of ourselves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Server {
    pub host: String,
    /// The directory that is mounted.
    pub dir: String,
    /// 0: the port mapper is asked.
    pub nfs_port: u16,
    pub mount_port: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds after which a request that gets no answer fails; 0: never.
    pub timeout: u64,
}

/// Below the 30 s after which Linux gives an IDE request up.
const TIMEOUT: u64 = 25;

/// Take a URL apart: the server with the image's directory, and the image's name.
pub fn parse(url: &str) -> Result<(Server, String), String> {
    let rest = url.strip_prefix("nfs://").ok_or("not an nfs:// URL")?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (place, path) = rest.split_once('/').ok_or("No file path specified in the NFS URL")?;
    let (host, port) = host_port(place, 0).ok_or("No hostname was specified")?;
    let path = unescape(path).ok_or("the NFS URL's path is not readable")?;
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", &path));
    if name.is_empty() || name == "." || name == ".." {
        return Err("Invalid URL specified: it names no file".into());
    }
    let mut server = Server {
        host,
        dir: format!("/{dir}"),
        nfs_port: port,
        mount_port: 0,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        timeout: TIMEOUT,
    };
    for item in query.split('&').filter(|q| !q.is_empty()) {
        let (key, value) = item.split_once('=').unwrap_or((item, ""));
        let known = [
            "uid",
            "gid",
            "nfsport",
            "mountport",
            "timeout",
            "tcp-syncnt",
            "readahead",
            "pagecache",
            "debug",
        ];
        if !known.contains(&key) {
            return Err(format!("Unknown NFS parameter name: '{key}'"));
        }
        let number: u64 = value.parse().map_err(|_| format!("Illegal value for NFS parameter: {key}"))?;
        let port = || u16::try_from(number).map_err(|_| format!("Illegal value for NFS parameter: {key}"));
        match key {
            "uid" => server.uid = number as u32,
            "gid" => server.gid = number as u32,
            "nfsport" => server.nfs_port = port()?,
            "mountport" => server.mount_port = port()?,
            "timeout" => server.timeout = number,
            // What libnfs does for speed is not needed here.
            _ => {}
        }
    }
    Ok((server, name.to_owned()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn urls_are_taken_apart_as_qemu_does() {
        let (s, name) = super::parse("nfs://srv/a/b/vm%20.qcow2?uid=5&nfsport=2049").unwrap();
        assert_eq!((s.host.as_str(), s.dir.as_str(), name.as_str()), ("srv", "/a/b", "vm .qcow2"));
        assert_eq!((s.uid, s.nfs_port), (5, 2049));
        for bad in
            ["nfs://srv", "nfs://srv/", "nfs:///x", "nfs://srv/a/..", "nfs://s/x?warp=1", "nfs://s/x?uid=me"]
        {
            assert!(super::parse(bad).is_err(), "{bad}");
        }
    }
}
