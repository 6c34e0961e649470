package bpf

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSlotsAreThoseOfThePrograms(t *testing.T) {
	for slot, want := range map[Slot]connectSlot{
		OutboundIPv4:         connectSlotSLOT_OUTBOUND,
		InboundPlaintextIPv4: connectSlotSLOT_INBOUND_PLAINTEXT,
		InboundHBONEIPv4:     connectSlotSLOT_INBOUND_HBONE,
		DNSIPv4:              connectSlotSLOT_DNS,
		DNSOverTCPIPv4:       connectSlotSLOT_DNS_TCP,
		DNSOverTCPIPv6 + 1:   connectSlotSLOTS,
	} {
		if connectSlot(slot) != want {
			t.Errorf("slot %d, the programs have %d", slot, want)
		}
	}
}

func TestPodSurvivesTheKernelsForm(t *testing.T) {
	for _, want := range []Pod{
		{Cookie: 7, UID: "0c6e1cc9-2ed5-4c5c-8cf6-6c4a6a2bd9d7", IPs: []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00::7")}},
		{Cookie: 8, UID: strings.Repeat("u", 64), IPs: []netip.Addr{netip.MustParseAddr("fd00::8")}},
	} {
		value, err := encodePod(want)
		if err != nil {
			t.Fatal(err)
		}
		got := decodePod(want.Cookie, value)
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("pod (-want +got):\n%s", diff)
		}
	}
	nine := make([]netip.Addr, 9)
	for i := range nine {
		nine[i] = netip.MustParseAddr("10.0.0.1")
	}
	for name, bad := range map[string]Pod{
		"no address": {UID: "u"}, "too many": {UID: "u", IPs: nine}, "long UID": {UID: strings.Repeat("u", 65), IPs: nine[:1]},
	} {
		if _, err := encodePod(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestAddressesAreInNetworkOrder(t *testing.T) {
	ip := netip.MustParseAddr("10.1.2.3")
	if got := fromAddr(toAddr(ip)); got != ip {
		t.Errorf("%v came back as %v", ip, got)
	}
	if toAddr(netip.MustParseAddr("::ffff:10.1.2.3")) != toAddr(ip) {
		t.Error("an IPv4 address and its IPv6 form differ")
	}
}

func TestFindCgroup2(t *testing.T) {
	for _, tc := range []struct{ name, mounts, want string }{
		{"unified", "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup"},
		{"hybrid", "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "/sys/fs/cgroup/unified"},
		{"none", "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "mounts")
			if err := os.WriteFile(path, []byte(tc.mounts), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := FindCgroup2(path)
			if got != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("got %q, %v; want %q", got, err, tc.want)
			}
		})
	}
}
