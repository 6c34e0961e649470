package redirect_test

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// forgery is a TCP SYN that an attacker makes by itself, in a process of the pod's.
type forgery struct {
	Src, Dst netip.AddrPort
	// From and To are the link's ends.
	From, To net.HardwareAddr
	// Way is how it is sent.
	Way string
	// Device is the pod's interface; empty means eth0.
	Device string
}

// The ways to send a packet past the kernel's TCP.
const (
	wayPacket    = "packet socket"
	wayDirect    = "packet socket past the queue"
	wayRaw       = "raw socket"
	wayFragments = "fragments"
	wayTagged    = "VLAN tag"
	wayOptions   = "IPv6 options"
)

func init() {
	if f := os.Getenv("FAIRLEAD_TEST_FORGE"); f != "" {
		forge(f)
		os.Exit(0)
	}
}

// forge sends the SYN from the namespace in descriptor 3 and tells whether it was answered.
func forge(arguments string) {
	var f forgery
	must := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	must(json.Unmarshal([]byte(arguments), &f))
	must(netns.Do(os.NewFile(3, "netns"), func() error {
		eth, err := net.InterfaceByName(cmp.Or(f.Device, "eth0"))
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: eth.Index}); err != nil {
			return err
		}
		if f.Way == wayDirect {
			if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
				return err
			}
		}
		if f.Way == wayRaw {
			err = f.sendRaw()
		} else {
			for _, frame := range f.frames() {
				err = unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth.Index, Halen: 6})
			}
		}
		if err != nil {
			return err
		}
		return f.await(fd)
	}))
}

// await prints whether a segment comes back.
func (f forgery) await(fd int) error {
	timeout := unix.Timeval{Usec: 50_000}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return err
	}
	buf := make([]byte, 2048)
	for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			continue
		}
		ports := make([]byte, 4)
		binary.BigEndian.PutUint16(ports, f.Dst.Port())
		binary.BigEndian.PutUint16(ports[2:], f.Src.Port())
		if strings.Contains(string(buf[:n]), string(ports)) {
			fmt.Print("answered")
			return nil
		}
	}
	fmt.Print("silence")
	return nil
}

func (f forgery) sendRaw() error {
	family, addr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: f.Dst.Addr().As16()})
	if f.Dst.Addr().Is4() {
		family, addr = unix.AF_INET, &unix.SockaddrInet4{Addr: f.Dst.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, f.packet(f.segment(), unix.IPPROTO_TCP, 0), 0, addr)
}

// frames are the Ethernet frames to send.
func (f forgery) frames() [][]byte {
	segment := f.segment()
	head := append(append([]byte{}, f.To...), f.From...)
	kind := []byte{0x08, 0x00}
	if f.Dst.Addr().Is6() {
		kind = []byte{0x86, 0xdd}
	}
	var frames [][]byte
	for _, packet := range f.packets(segment) {
		frame := append([]byte{}, head...)
		if f.Way == wayTagged {
			frame = append(frame, 0x81, 0x00, 0, 0) // priority tag: the host takes it as untagged
		}
		frames = append(frames, append(append(frame, kind...), packet...))
	}
	return frames
}

func (f forgery) packets(segment []byte) [][]byte {
	switch f.Way {
	case wayFragments:
		if f.Dst.Addr().Is6() {
			first := append([]byte{unix.IPPROTO_TCP, 0, 0, 1, 0, 0, 0, 9}, segment[:24]...)
			second := append([]byte{unix.IPPROTO_TCP, 0, 0, 24, 0, 0, 0, 9}, segment[24:]...)
			return [][]byte{f.packet(first, 44, 0), f.packet(second, 44, 0)}
		}
		return [][]byte{f.packet(segment[:24], unix.IPPROTO_TCP, 0x2000), f.packet(segment[24:], unix.IPPROTO_TCP, 3)}
	case wayOptions:
		options := []byte{60, 0, 1, 4, 0, 0, 0, 0, unix.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0}
		return [][]byte{f.packet(append(options, segment...), 0, 0)}
	}
	return [][]byte{f.packet(segment, unix.IPPROTO_TCP, 0)}
}

// packet is an IP packet; fragment is the field of that name of IPv4's header.
func (f forgery) packet(payload []byte, protocol byte, fragment uint16) []byte {
	src, dst := f.Src.Addr().AsSlice(), f.Dst.Addr().AsSlice()
	if f.Dst.Addr().Is6() {
		h := append([]byte{0x60, 0, 0, 0, 0, byte(len(payload)), protocol, 64}, src...)
		return append(append(h, dst...), payload...)
	}
	h := append([]byte{0x45, 0, 0, byte(20 + len(payload)), 0, 9, byte(fragment >> 8), byte(fragment), 64, protocol, 0, 0}, src...)
	h = append(h, dst...)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

// segment is a TCP SYN with padding, so that it can be cut in pieces.
func (f forgery) segment() []byte {
	s := make([]byte, 32)
	binary.BigEndian.PutUint16(s, f.Src.Port())
	binary.BigEndian.PutUint16(s[2:], f.Dst.Port())
	copy(s[12:], []byte{8 << 4, 0x02, 0xff, 0xff})
	copy(s[20:], []byte{2, 4, 5, 0xb4})
	pseudo := append(append([]byte{}, f.Src.Addr().AsSlice()...), f.Dst.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(s)))
	binary.BigEndian.PutUint16(s[16:], checksum(append(pseudo, s...)))
	return s
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// forge runs a forgery in a process of the pod's.
func (l *lab) forge(t *testing.T, f forgery) string {
	t.Helper()
	group, err := os.Open(l.makeCgroup(t, "app"))
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	arguments, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "FAIRLEAD_TEST_FORGE="+string(arguments))
	cmd.ExtraFiles = []*os.File{l.pod}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("forge by %s: %v: %s", f.Way, err, out)
	}
	return string(out)
}
