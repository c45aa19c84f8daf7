//! Memory from large pages of the host, for what the processor looks at all over: blocks, tables by linear address, TLBs.
//! There are many megabytes of it, and the host's own TLB holds too few small pages for them.
//!
//! Freed memory is used again for the same size, and stays with the process.

use std::alloc::{handle_alloc_error, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// A large page of the host.
const LARGE: usize = 2 << 20;
/// Asked of the host at a time.
const CHUNK: usize = 16 * LARGE;
/// Of every piece.
const ALIGN: usize = 64;
/// Up to here sizes are multiples of [`ALIGN`], powers of two beyond.
const FINE: usize = 2048;
const CLASSES: usize = FINE / ALIGN + 1 + usize::BITS as usize;

/// Free memory.
struct Pool {
    /// By class: the first free piece, which holds the address of the next.
    free: [usize; CLASSES],
    /// What is left of the newest chunk.
    next: usize,
    end: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { free: [0; CLASSES], next: 0, end: 0 });

/// The class that holds `size` bytes, and its pieces' size.
fn class(size: usize) -> (usize, usize) {
    if size <= FINE {
        let n = size.div_ceil(ALIGN).max(1);
        return (n, n * ALIGN);
    }
    let size = size.next_power_of_two();
    (FINE / ALIGN + 1 + size.trailing_zeros() as usize, size)
}

impl Pool {
    fn take(&mut self, size: usize) -> NonNull<u8> {
        let (class, size) = class(size);
        if let Some(p) = NonNull::new(self.free[class] as *mut u8) {
            // SAFETY: a free piece, which holds the address of the next.
            self.free[class] = unsafe { p.cast::<usize>().read() };
            return p;
        }
        if self.next + size > self.end {
            let bytes = size.next_multiple_of(CHUNK);
            self.next = chunk(bytes).as_ptr() as usize;
            self.end = self.next + bytes;
        }
        let at = self.next as *mut u8;
        self.next += size;
        // SAFETY: within what the host gave.
        unsafe { NonNull::new_unchecked(at) }
    }

    /// # Safety
    /// `p` is from `take` with this size, and used no more.
    unsafe fn give(&mut self, p: NonNull<u8>, size: usize) {
        let (class, _) = class(size);
        // SAFETY: the caller's promise; pieces are large enough and aligned.
        unsafe { p.cast::<usize>().write(self.free[class]) };
        self.free[class] = p.as_ptr() as usize;
    }
}

/// New memory of `size` bytes.
fn chunk(size: usize) -> NonNull<u8> {
    const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: plain system calls, on what they gave. A host without large pages says so, which changes nothing.
    unsafe {
        let start = libc::mmap(std::ptr::null_mut(), size + LARGE, prot, FLAGS, -1, 0);
        if start == libc::MAP_FAILED {
            handle_alloc_error(Layout::from_size_align_unchecked(size, ALIGN));
        }
        let start = start.cast::<u8>();
        let start = start.add(start.align_offset(LARGE));
        libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE);
        NonNull::new_unchecked(start)
    }
}

fn pool() -> std::sync::MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As a boxed slice.
pub struct Large<T>(NonNull<[T]>);

// SAFETY: it owns its elements, as a box does.
unsafe impl<T: Send> Send for Large<T> {}

impl<T> Large<T> {
    fn room(len: usize) -> NonNull<T> {
        const { assert!(align_of::<T>() <= ALIGN) };
        let size = len * size_of::<T>();
        if size == 0 {
            return NonNull::dangling();
        }
        pool().take(size).cast()
    }
}

impl<T: Copy> Large<T> {
    /// A copy of `values`.
    pub fn copy(values: &[T]) -> Large<T> {
        let p = Self::room(values.len());
        // SAFETY: there is room for as many; new memory overlaps nothing.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), p.as_ptr(), values.len()) };
        Large(NonNull::slice_from_raw_parts(p, values.len()))
    }
}

impl<T: Copy> FromIterator<T> for Large<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Large::copy(&values.into_iter().collect::<Vec<T>>())
    }
}

impl<T> Default for Large<T> {
    fn default() -> Self {
        Large(NonNull::slice_from_raw_parts(NonNull::dangling(), 0))
    }
}

impl<T> Deref for Large<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: they are there until the drop.
        unsafe { self.0.as_ref() }
    }
}
impl<T> DerefMut for Large<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }
}

impl<T> Drop for Large<T> {
    fn drop(&mut self) {
        let size = self.len() * size_of::<T>();
        // SAFETY: the elements are used no more, and the memory is from `take` with this size.
        unsafe {
            self.0.drop_in_place();
            if size != 0 {
                pool().give(self.0.cast(), size);
            }
        }
    }
}

/// As a box, perhaps with elements of another type behind the value.
pub struct Kept<T> {
    value: NonNull<T>,
    /// Of the piece.
    size: usize,
}

// SAFETY: it owns its value, as a box does.
unsafe impl<T: Send> Send for Kept<T> {}

impl<T> Kept<T> {
    pub fn new(value: T) -> Kept<T> {
        Kept::with(value, &[] as &[u8], |_, _| ())
    }

    /// `value`, and a copy of `tail` behind it, of which `know` lets it know where it starts.
    pub fn with<U: Copy>(mut value: T, tail: &[U], know: impl FnOnce(&mut T, *const U)) -> Kept<T> {
        const { assert!(align_of::<T>() <= ALIGN && align_of::<U>() <= align_of::<T>()) };
        let size = size_of::<T>() + size_of_val(tail);
        let at = pool().take(size.max(1)).cast::<T>();
        // SAFETY: there is room for the value and as many elements, whose alignment is no larger; new memory overlaps nothing.
        unsafe {
            let behind = at.add(1).cast::<U>().as_ptr();
            std::ptr::copy_nonoverlapping(tail.as_ptr(), behind, tail.len());
            know(&mut value, behind);
            at.write(value);
        }
        Kept { value: at, size: size.max(1) }
    }
}
impl<T> Deref for Kept<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: it is there until the drop.
        unsafe { self.value.as_ref() }
    }
}
impl<T> DerefMut for Kept<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { self.value.as_mut() }
    }
}
impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        // SAFETY: the value is used no more, and the memory is from `take` with this size.
        unsafe {
            self.value.drop_in_place();
            pool().give(self.value.cast(), self.size);
        }
    }
}
impl<T: Default> Default for Kept<T> {
    fn default() -> Self {
        Kept::new(T::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fit_their_classes() {
        let mut last = (0, 0);
        for size in 1..10_000 {
            let (n, piece) = class(size);
            assert!(piece >= size && piece % ALIGN == 0 && n < CLASSES);
            assert!((n, piece) == last || n > last.0 && piece > last.1, "{size}");
            last = (n, piece);
        }
    }

    #[test]
    fn pieces_are_apart_and_keep_what_they_hold() {
        let mut kept: Vec<Large<u64>> = Vec::new();
        for n in 0..2000usize {
            kept.push((0..n as u64 % 700).map(|i| i ^ (n as u64) << 32).collect());
            if n % 3 == 0 {
                kept.swap_remove(n / 7 % kept.len());
            }
        }
        for k in &kept {
            assert_eq!(k.as_ptr() as usize % if k.is_empty() { 8 } else { ALIGN }, 0);
            let of = k.first().map_or(0, |v| v >> 32);
            assert!(k.iter().zip(0..).all(|(v, i)| *v == i | of << 32));
        }
    }

    #[test]
    fn what_lies_behind_a_value_is_there() {
        for n in 0..100u64 {
            let tail: Vec<u64> = (0..n).map(|i| i ^ n << 32).collect();
            let kept = Kept::with(std::ptr::null(), &tail, |p, tail| *p = tail);
            // SAFETY: so many were put there.
            let found = unsafe { std::slice::from_raw_parts::<u64>(*kept, n as usize) };
            assert_eq!(found, tail);
        }
    }

    #[test]
    fn what_it_owns_is_dropped_once() {
        let counted = std::rc::Rc::new(());
        let kept = Kept::new(counted.clone());
        assert_eq!(std::rc::Rc::strong_count(&kept), 2);
        drop(kept);
        assert_eq!(std::rc::Rc::strong_count(&counted), 1);
    }
}
