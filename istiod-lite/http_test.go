package istiod

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// get is the status code of a request, 0 where nobody answers.
func get(address, path string) int {
	response, err := http.Get("http://" + address + path)
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	return response.StatusCode
}

func TestMonitoringShowsProxies(t *testing.T) {
	w := start(t, map[string]string{"mesh.yaml": twoNodes})
	w.ztunnel()
	body := func(path string) string {
		t.Helper()
		response, err := http.Get("http://" + w.cfg.MonitoringAddr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	w.wait("the proxy is shown as in sync", func() bool {
		text := body("/debug/syncz")
		return strings.Contains(text, "ztunnel-one.istio-system") && strings.Contains(text, `"SYNCED"`)
	})
	for _, want := range []string{"fairlead_istiod_workloads 3", "pilot_xds 1", "fairlead_istiod_recompute_seconds_count"} {
		if !strings.Contains(body("/metrics"), want) {
			t.Errorf("/metrics has no %q", want)
		}
	}
}
