# Makes an ELF file with symbols of a Linux bzImage: vmlinux.py PACKAGES BZIMAGE OUT
import runpy, struct, sys
packages, image, out = sys.argv[1:4]
sys.path.insert(0, packages)
import lz4.block
data = open(image, 'rb').read()
start, size = struct.unpack_from('<II', data, 0x248)
start += ((data[0x1F1] or 4) + 1) * 512
payload = data[start:start + size]
assert payload[:4] == b'\x02\x21\x4c\x18', 'not compressed with LZ4'
kernel, at = b'', 4
while at + 4 <= len(payload):
    n, = struct.unpack_from('<I', payload, at)
    at += 4
    if n == 0 or n > len(payload) - at:
        break
    kernel += lz4.block.decompress(payload[at:at + n], uncompressed_size=8 << 20)
    at += n
open(out + '.raw', 'wb').write(kernel)
sys.argv = ['vmlinux-to-elf', '--e-machine', '62', '--bit-size', '64', out + '.raw', out]
runpy.run_path(packages + '/bin/vmlinux-to-elf', run_name='__main__')
