//! The directory beside an image: lock files and overlays, on a mounted file system or an NFS server; lock files in etcd, too.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory. All names are without `/`. What a call did is on stable storage when it returns.
pub trait Files: Send + Sync {
    /// Make a new file with these contents; an error if the name exists.
    fn create(&self, name: &str, contents: &[u8]) -> io::Result<()>;
    /// A small file's contents.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Give a file a second name, atomically; an error if that exists.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;
    /// Give a file another name; what had that name before is gone.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Take a name away.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Whether a name exists. No answer is an error.
    fn exists(&self, name: &str) -> io::Result<bool>;
    /// All names.
    fn list(&self) -> io::Result<Vec<String>>;
    /// The directory itself is there (or: the storage answers).
    fn check(&self) -> io::Result<()>;
}

/// Whether `path` is a URL of an NFS server.
pub fn is_nfs(path: &Path) -> bool {
    path.to_str().is_some_and(|p| p.starts_with("nfs://"))
}

/// Whether `path` is a URL of a key in etcd.
pub fn is_etcd(path: &Path) -> bool {
    path.to_str().is_some_and(|p| p.starts_with("etcd://"))
}

/// The name of a file beside the one that `path` (a path or a URL) names.
pub fn beside_path(path: &Path, suffix: &str) -> PathBuf {
    let is_url = is_nfs(path) || is_etcd(path);
    if let Some((url, query)) = path.to_str().filter(|_| is_url).and_then(|p| p.split_once('?')) {
        return format!("{url}{suffix}?{query}").into();
    }
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The directory of `path` (a path, an `nfs://` or an `etcd://` URL) and the name in it.
pub fn beside(path: &Path) -> io::Result<(Arc<dyn Files>, String)> {
    if let Some(_url) = path.to_str().filter(|_| is_etcd(path)) {
        #[cfg(feature = "etcd")]
        return crate::etcd::beside(_url);
        #[cfg(not(feature = "etcd"))]
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this ftvm was built without etcd"));
    }
    if let Some(url) = path.to_str().filter(|_| is_nfs(path)) {
        return crate::nfs::beside(url);
    }
    let name = path.file_name().and_then(|n| n.to_str());
    let name =
        name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path does not name a file"))?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((Arc::new(Local(dir.to_owned())), name.to_owned()))
}

/// A directory of a mounted file system.
struct Local(PathBuf);

impl Local {
    fn sync(&self) -> io::Result<()> {
        fs::File::open(&self.0)?.sync_all()
    }
}

impl Files for Local {
    fn create(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let mut file = fs::File::options().write(true).create_new(true).open(self.0.join(name))?;
        file.write_all(contents)?;
        file.sync_all()?;
        self.sync()
    }
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.0.join(name))
    }
    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.0.join(from), self.0.join(to))?;
        self.sync()
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.0.join(from), self.0.join(to))?;
        self.sync()
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.0.join(name))?;
        self.sync()
    }
    fn exists(&self, name: &str) -> io::Result<bool> {
        match fs::symlink_metadata(self.0.join(name)) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
    fn list(&self) -> io::Result<Vec<String>> {
        fs::read_dir(&self.0)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
    }
    fn check(&self) -> io::Result<()> {
        self.sync()
    }
}
