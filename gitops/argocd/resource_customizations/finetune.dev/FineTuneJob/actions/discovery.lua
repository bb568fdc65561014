-- The buttons Argo CD offers on a FineTuneJob.
local over = false
if obj.status ~= nil and obj.status.conditions ~= nil then
  for _, condition in ipairs(obj.status.conditions) do
    if (condition.type == "Complete" or condition.type == "Failed") and condition.status == "True" then
      over = true
    end
  end
end
local suspended = obj.spec.suspend == true
return {
  ["suspend"] = {["disabled"] = over or suspended},
  ["resume"] = {["disabled"] = over or not suspended},
}
