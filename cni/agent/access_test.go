package agent

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
)

// openAPI is a client of a server, by a kubeconfig with more in its entry of the cluster.
func openAPI(t *testing.T, server, cluster string) *api {
	t.Helper()
	kubeconfig := filepath.Join(t.TempDir(), "config")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],` +
		`"clusters":[{"name":"c","cluster":{"server":"` + server + `"` + cluster + `}}]}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := newAPI(kubeconfig, "node1")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAccessIsATokenOfThePluginsAccount(t *testing.T) {
	var asked, body, answer string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, _ := io.ReadAll(r.Body)
		asked, body = r.Method+" "+r.URL.Path, string(text)
		w.Header().Set("Content-Type", "application/json")
		if answer == "" {
			w.WriteHeader(http.StatusForbidden)
			answer = `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403}`
		}
		io.WriteString(w, answer)
	}))
	defer server.Close()
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	a := openAPI(t, server.URL, `,"tls-server-name":"example.com","certificate-authority-data":"`+base64.StdEncoding.EncodeToString([]byte(ca))+`"`)
	for _, tc := range []struct {
		name, answer string
		life         time.Duration
		fails        string
	}{
		{"as asked", `{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","spec":{"expirationSeconds":86400},"status":{"token":"t"}}`, 24 * time.Hour, ""},
		{"for less time", `{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","spec":{"expirationSeconds":3600},"status":{"token":"t"}}`, time.Hour, ""},
		{"without a token", `{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","spec":{},"status":{}}`, 0, "no token in the answer"},
		{"not allowed", "", 0, "istio-system/istio-cni-plugin"},
	} {
		answer = tc.answer
		got, life, err := a.access(t.Context(), "istio-system/istio-cni-plugin")
		if tc.fails != "" {
			if err == nil || !strings.Contains(err.Error(), tc.fails) {
				t.Errorf("%s: error %v", tc.name, err)
			}
			continue
		}
		want := plugin.Access{Server: server.URL, ServerName: "example.com", CA: ca, Token: "t"}
		if diff := cmp.Diff(want, got); diff != "" || err != nil || life != tc.life {
			t.Errorf("%s: for %v, %v (-want +got):\n%s", tc.name, life, err, diff)
		}
	}
	if want := "POST /api/v1/namespaces/istio-system/serviceaccounts/istio-cni-plugin/token"; asked != want {
		t.Errorf("asked %s, want %s", asked, want)
	}
	var request struct{ Spec map[string]any }
	if err := json.Unmarshal([]byte(body), &request); err != nil {
		t.Fatal(err)
	}
	// Not for another server than this one, and not bound to the agent's pod.
	if diff := cmp.Diff(map[string]any{"audiences": nil, "expirationSeconds": 86400.0, "boundObjectRef": nil}, request.Spec); diff != "" {
		t.Errorf("asked for (-want +got):\n%s", diff)
	}
	if _, _, err := a.access(t.Context(), "istio-cni-plugin"); err == nil {
		t.Error("an account without a namespace is accepted")
	}
}

// The plugin must not believe a server that it cannot verify.
func TestAccessIsToAVerifiedServer(t *testing.T) {
	ca := filepath.Join(t.TempDir(), "ca.crt")
	for _, tc := range []struct {
		server, cluster string
		want            plugin.Access
		ok              bool
	}{
		{"https://10.0.0.1:6443", `,"certificate-authority":"` + ca + `"`, plugin.Access{Server: "https://10.0.0.1:6443", CA: "first"}, true},
		{"https://10.0.0.1:6443", `,"certificate-authority":"` + ca + `"`, plugin.Access{Server: "https://10.0.0.1:6443", CA: "second"}, true},
		{"https://api.example/clusters/one/", "", plugin.Access{Server: "https://api.example/clusters/one"}, true},
		{"https://[fd00::1]:6443", "", plugin.Access{Server: "https://[fd00::1]:6443"}, true},
		{"http://10.0.0.1:8080", "", plugin.Access{}, false},
		{"https://10.0.0.1:6443", `,"insecure-skip-tls-verify":true`, plugin.Access{}, false},
	} {
		if err := os.WriteFile(ca, []byte(testenv.Certificate), 0o600); err != nil {
			t.Fatal(err)
		}
		a := openAPI(t, tc.server, tc.cluster)
		if err := os.WriteFile(ca, []byte(tc.want.CA), 0o600); err != nil { // after the client has begun
			t.Fatal(err)
		}
		got, err := accessTo(a.config)
		if diff := cmp.Diff(tc.want, got); diff != "" || (err == nil) != tc.ok {
			t.Errorf("%s %s: %v (-want +got):\n%s", tc.server, tc.cluster, err, diff)
		}
	}
}

// tokens is a cluster that gives accesses, or fails.
type tokens struct {
	cluster
	token string
	life  time.Duration
	err   error
}

func (c *tokens) access(context.Context, string) (plugin.Access, time.Duration, error) {
	return plugin.Access{Server: "https://10.0.0.1", Token: c.token}, c.life, c.err
}

func TestAccessIsRenewedAndOutlivesFailures(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "plugin")
	path := filepath.Join(dir, "access.json")
	a := &agent{cfg: Config{PluginAccount: "istio-system/istio-cni-plugin", PluginAccess: path}}
	for _, tc := range []struct {
		cluster tokens
		wait    time.Duration
		token   string
	}{
		{tokens{token: "first", life: 24 * time.Hour}, 2 * time.Hour, "first"},
		{tokens{token: "none", err: errors.New("the API server is away")}, accessRetry, "first"},
		{tokens{token: "second", life: time.Hour}, 5 * time.Minute, "second"},
		{tokens{token: "third", life: time.Second}, accessRetry, "third"},
	} {
		wait, err := a.renewAccess(t.Context(), &tc.cluster)
		if wait != tc.wait || (err == nil) != (tc.cluster.err == nil) {
			t.Errorf("%+v: next after %v, %v", tc.cluster, wait, err)
		}
		var got plugin.Access
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &got); err != nil || got.Token != tc.token {
			t.Errorf("%+v: on disk is %s, %v", tc.cluster, text, err)
		}
	}
	for name, want := range map[string]os.FileMode{path: 0o600, dir: 0o700 | os.ModeDir} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

func TestAccessIsKeptUntilTheEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plugin", "access.json")
	core, logged := observer.New(zap.InfoLevel)
	a := &agent{cfg: Config{PluginAccess: path}, log: zap.New(core)}
	if err := a.keepAccess(t.Context(), &tokens{token: "t", life: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without an account: %v", err)
	}
	a.cfg.PluginAccount = "istio-system/istio-cni-plugin"
	for _, tc := range []struct {
		cluster tokens
		errors  int
	}{{tokens{token: "t", life: time.Hour}, 0}, {tokens{err: errors.New("forbidden")}, 1}} {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- a.keepAccess(ctx, &tc.cluster) }()
		for tc.errors != logged.Len() {
			time.Sleep(time.Millisecond)
		}
		for _, err := os.Stat(path); err != nil; _, err = os.Stat(path) {
			time.Sleep(time.Millisecond)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if logged.Len() != tc.errors {
			t.Errorf("%+v: logged %v", tc.cluster, logged.All())
		}
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("at the agent's end: %v", err)
	}
}
