package accesslog

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestWrite(t *testing.T) {
	for _, tc := range []struct {
		name   string
		record Record
		level  zapcore.Level
		want   map[string]any
	}{
		{"complete", Record{
			Source:      Peer{Addr: netip.MustParseAddrPort("10.0.0.1:40000"), Workload: "client", Namespace: "shop", Identity: "spiffe://td/ns/shop/sa/client"},
			Destination: Peer{Addr: netip.MustParseAddrPort("[fd00::2]:15008"), Workload: "web", Namespace: "shop", Identity: "spiffe://td/ns/shop/sa/web"},
			HBONEAddr:   "[fd00::2]:80", Service: "web.shop.svc.cluster.local", Direction: "outbound", Path: "hbone",
			Sent: 12, Received: 34, Duration: 1500 * time.Millisecond, Flag: "-",
		}, zapcore.InfoLevel, map[string]any{
			"src.addr": "10.0.0.1:40000", "src.workload": "client", "src.namespace": "shop", "src.identity": "spiffe://td/ns/shop/sa/client",
			"dst.addr": "[fd00::2]:15008", "dst.workload": "web", "dst.namespace": "shop", "dst.identity": "spiffe://td/ns/shop/sa/web",
			"dst.hbone_addr": "[fd00::2]:80", "dst.service": "web.shop.svc.cluster.local", "direction": "outbound", "path": "hbone",
			"bytes_sent": int64(12), "bytes_recv": int64(34), "duration": "1500ms", "response_flags": "-",
		}},
		{"denied", Record{
			Source: Peer{Addr: netip.MustParseAddrPort("10.0.0.1:40000")}, Direction: "inbound",
			Flag: "DENY", Policy: "shop/deny-client", DryRun: []string{"DENY shop/a", "ALLOW shop/b"}, Err: "denied by policy shop/deny-client",
		}, zapcore.ErrorLevel, map[string]any{
			"src.addr": "10.0.0.1:40000", "direction": "inbound", "bytes_sent": int64(0), "bytes_recv": int64(0), "duration": "0ms",
			"response_flags": "DENY", "policy": "shop/deny-client", "dry_run": "DENY shop/a, ALLOW shop/b", "error": "denied by policy shop/deny-client",
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			core, logs := observer.New(zapcore.DebugLevel)
			New(zap.New(core)).Write(&tc.record)
			lines := logs.All()
			if len(lines) != 1 {
				t.Fatalf("%d lines, want 1", len(lines))
			}
			if lines[0].Level != tc.level {
				t.Errorf("level %v, want %v", lines[0].Level, tc.level)
			}
			if diff := cmp.Diff(tc.want, lines[0].ContextMap()); diff != "" {
				t.Errorf("fields (-want +got):\n%s", diff)
			}
		})
	}
}
