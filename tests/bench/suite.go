package main

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

const (
	// hbonePort is the port of HBONE servers.
	hbonePort = 15008
	// keyShare is the TLS extension that names the key exchange.
	keyShare = 51
)

// sniffer reads what servers of HBONE answer to handshakes on the link between the machines: the cipher suite and the key
// exchange are said in clear, by whatever implementation.
type sniffer struct{ fd int }

func newSniffer(m *machine) (*sniffer, error) {
	s := &sniffer{}
	err := netns.Do(m.ns, func() (err error) {
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_IP)))
		return err
	})
	return s, err
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (s *sniffer) close() { unix.Close(s.fd) }

// suite waits for a ServerHello of the server with that address, and says what it chose.
func (s *sniffer) suite(server [4]byte, patience time.Duration) (string, error) {
	packet := make([]byte, 64<<10)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(s.fd, packet, 0)
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if chosen, ok := serverHello(packet[:n], server); ok {
			return chosen, nil
		}
	}
	return "", fmt.Errorf("no TLS handshake seen")
}

// serverHello reads an IPv4 packet that begins with a TLS ServerHello (RFC 8446, 4.1.3), from port 15008 of that address.
func serverHello(p []byte, from [4]byte) (string, bool) {
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != unix.IPPROTO_TCP || [4]byte(p[12:16]) != from {
		return "", false
	}
	tcp := p[min(len(p), int(p[0]&15)*4):]
	if len(tcp) < 20 || binary.BigEndian.Uint16(tcp) != hbonePort {
		return "", false
	}
	record := tcp[min(len(tcp), int(tcp[12]>>4)*4):]
	const beforeSession = 5 + 4 + 2 + 32 // record header, handshake header, version, random
	if len(record) < beforeSession+1 || record[0] != 22 || record[5] != 2 {
		return "", false
	}
	rest := record[beforeSession:]
	rest = rest[min(len(rest), 1+int(rest[0])):]
	if len(rest) < 5 {
		return "", false
	}
	chosen := tls.CipherSuiteName(binary.BigEndian.Uint16(rest))
	for extensions := rest[5:]; len(extensions) >= 4; {
		kind, size := binary.BigEndian.Uint16(extensions), int(binary.BigEndian.Uint16(extensions[2:]))
		extensions = extensions[4:]
		if kind == keyShare && len(extensions) >= 2 {
			return chosen + " " + tls.CurveID(binary.BigEndian.Uint16(extensions)).String(), true
		}
		extensions = extensions[min(len(extensions), size):]
	}
	return chosen, true
}
