//! The program's memory: the C library's, with large blocks at the start of a cache line.
//!
//! Blocks of a request's size come from the C library 16 bytes after a cache line's start. The kernel's copy between such a block
//! and the page cache takes a tenth longer (measured on an AMD EPYC, 1 MiB; `benches/block.rs` shows it).

use std::alloc::{GlobalAlloc, Layout};

use libc::c_void;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Blocks from here on are aligned.
const LARGE: usize = 16 << 10;
/// Zeroed blocks from here on are not: the kernel's fresh memory is zero, and may never be touched.
const HUGE: usize = 4 << 20;

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

// SAFETY: every block comes from malloc, calloc, realloc or posix_memalign, all of which free and realloc take; each is at
// least as large as the layout says, and aligned as it says: malloc and its kin align to 16 bytes, and a layout that
// asks for more goes to posix_memalign.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let align = if layout.size() >= LARGE { layout.align().max(LINE) } else { layout.align() };
        if align <= 16 {
            // SAFETY: malloc takes any size.
            return unsafe { libc::malloc(layout.size()) }.cast();
        }
        let mut block: *mut c_void = std::ptr::null_mut();
        // SAFETY: `align` is a power of two of at least a pointer's size, and `block` is ours to write to.
        match unsafe { libc::posix_memalign(&mut block, align, layout.size()) } {
            0 => block.cast(),
            _ => std::ptr::null_mut(),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= 16 && !(LARGE..HUGE).contains(&layout.size()) {
            // SAFETY: calloc takes any size.
            return unsafe { libc::calloc(1, layout.size()) }.cast();
        }
        // SAFETY: the caller's promises are those of `alloc`; the block has `layout.size()` bytes.
        unsafe {
            let block = self.alloc(layout);
            if !block.is_null() {
                block.write_bytes(0, layout.size());
            }
            block
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, _layout: Layout) {
        // SAFETY: the caller got `block` from this allocator.
        unsafe { libc::free(block.cast()) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if layout.align() <= 16 {
            // SAFETY: the caller got `block` from this allocator; what realloc returns is aligned to 16 bytes.
            return unsafe { libc::realloc(block.cast(), size) }.cast();
        }
        // SAFETY: the caller promises a size that makes a layout; both blocks have the bytes that are copied.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            new
        }
    }
}
