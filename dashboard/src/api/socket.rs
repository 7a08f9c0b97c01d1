//! The Unix socket of a node, in its data folder.
//!
//! A socket's address holds a path of about a hundred bytes only. Where the path is longer, it is named through a
//! descriptor of its folder, which Linux offers below `/proc/self/fd`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// The file name of a node's Unix socket in its data folder.
const NAME: &str = "api.sock";
/// The longest path, in bytes, that all systems accept: `sun_path` of macOS and the BSDs has 104 bytes, one for the
/// final zero.
const PATH_BYTES_MAX: usize = 103;

/// The place of a node's Unix socket.
#[derive(Debug)]
pub struct SocketPlace {
    /// The path that users see.
    path: PathBuf,
    /// The path for the system, and the open folder that it names.
    short: Option<(PathBuf, File)>,
}

impl SocketPlace {
    /// The socket of the node on a data folder.
    ///
    /// # Errors
    /// The path is too long for a socket, and the folder cannot be opened.
    pub fn of(data_dir: &Path) -> io::Result<Self> {
        let path = data_dir.join(NAME);
        if path.as_os_str().len() <= PATH_BYTES_MAX {
            return Ok(Self { path, short: None });
        }
        let folder = File::open(data_dir)?;
        let short = PathBuf::from(format!("/proc/self/fd/{}/{NAME}", folder.as_raw_fd()));
        Ok(Self { path, short: Some((short, folder)) })
    }

    /// The socket's path in the data folder, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path to bind or connect to. It holds as long as this value lives.
    pub fn address(&self) -> &Path {
        self.short.as_ref().map_or(&self.path, |(short, _)| short)
    }
}
