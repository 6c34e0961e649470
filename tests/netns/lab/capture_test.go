package lab

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// frame makes an Ethernet frame with a TCP segment.
func frame(source, destination string, payload string) []byte {
	from, to := netip.MustParseAddrPort(source), netip.MustParseAddrPort(destination)
	tcp := make([]byte, tcpHeader, tcpHeader+len(payload))
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	tcp[12] = tcpHeader / 4 << 4
	tcp = append(tcp, payload...)
	out := make([]byte, ethernetHeader)
	if from.Addr().Is4() {
		binary.BigEndian.PutUint16(out[12:], 0x0800)
		ip := make([]byte, ipv4Header)
		ip[0], ip[9] = 0x45, 6
		binary.BigEndian.PutUint16(ip[2:], uint16(ipv4Header+len(tcp)))
		copy(ip[12:], from.Addr().AsSlice())
		copy(ip[16:], to.Addr().AsSlice())
		out = append(out, ip...)
	} else {
		binary.BigEndian.PutUint16(out[12:], 0x86dd)
		ip := make([]byte, ipv6Header)
		ip[0], ip[6] = 0x60, 6
		binary.BigEndian.PutUint16(ip[4:], uint16(len(tcp)))
		copy(ip[8:], from.Addr().AsSlice())
		copy(ip[24:], to.Addr().AsSlice())
		out = append(out, ip...)
	}
	return append(out, tcp...)
}

func TestCaptureCounts(t *testing.T) {
	padded := append(frame("10.0.0.1:1", "10.0.0.2:80", "x"), 0, 0, 0, 0)
	arp := make([]byte, 60)
	binary.BigEndian.PutUint16(arp[12:], 0x0806)
	for _, tc := range []struct {
		name  string
		frame []byte
		want  Traffic
	}{
		{"plain", frame("10.0.0.1:1000", "10.0.0.2:80", "abc"), Traffic{Clear: 3}},
		{"plain with markers", frame("10.0.0.1:1000", "10.0.0.2:80", Marker+Marker), Traffic{Clear: int64(2 * len(Marker)), Markers: 2}},
		{"plain, IPv6", frame("[fd00::1]:1000", "[fd00::2]:80", "abcd"), Traffic{Clear: 4}},
		{"tunnel", frame("10.0.0.1:1000", "10.0.0.2:15008", "abc"), Traffic{Tunnel: 3}},
		{"tunnel, the other way", frame("[fd00::2]:15008", "[fd00::1]:1000", "abc"), Traffic{Tunnel: 3}},
		{"a tunnel that can be read", frame("10.0.0.1:1000", "10.0.0.2:15008", Marker), Traffic{Clear: int64(len(Marker)), Tunnel: int64(len(Marker)), Markers: 1}},
		{"no payload", frame("10.0.0.1:1000", "10.0.0.2:80", ""), Traffic{}},
		{"padding is no payload", padded, Traffic{Clear: 1}},
		{"ignored address", frame("10.99.0.1:15012", "10.0.0.2:1000", "abc"), Traffic{}},
		{"not IP", arp, Traffic{}},
		{"cut off", frame("10.0.0.1:1000", "10.0.0.2:80", "")[:40], Traffic{}},
		{"empty", nil, Traffic{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := Capture{ignore: []netip.Addr{netip.MustParseAddr("10.99.0.1")}}
			c.count(tc.frame)
			if diff := cmp.Diff(tc.want, c.total); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestAnswerString(t *testing.T) {
	a := Answer{Attempts: []Attempt{{Server: "b"}, {Error: "refused", Refused: true}, {Status: 403, Body: "no"}, {Server: "b"}}}
	want := "1× refused, 1× status 403 by  no, 2× answered by b"
	if got := a.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if a.OK() || a.Failed() || a.Last().Server != "b" || a.Servers()["b"] != 2 {
		t.Errorf("%+v", a)
	}
	if (Answer{}).OK() || !(Answer{}).Failed() || !strings.Contains((Answer{}).Last().Error, "nothing") {
		t.Error("an answer without attempts")
	}
}
